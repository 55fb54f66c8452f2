from pathlib import Path

from setuptools import find_packages, setup

EXAMPLES = ["torchvision>=0.26", "scikit-learn>=1.4", "tqdm>=4.66", "matplotlib>=3.8", "rich>=13"]
TORCHAO = ["torchao>=0.18"]

setup(
    name="torchao_superblock",
    version="0.1.0",
    description="Learned block sparsity for PyTorch: supermasks, BSR linear layers, fast kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["torchao_superblock", "torchao_superblock.*"]),
    package_data={"torchao_superblock": ["py.typed"]},
    install_requires=["torch>=2.11", "numpy", "safetensors>=0.4"],
    extras_require={
        "torchao": TORCHAO,
        "examples": EXAMPLES,
        "test": ["pytest>=8", "expecttest>=0.2", "hypothesis>=6.100", "ruff>=0.6", *EXAMPLES],
    },
)
