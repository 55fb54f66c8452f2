"""A name for the C sources, so that a compiled kernel can tell which text it was built from.

Loaded by `setup.py` without the package (torch is absent in an isolated build), so it imports
nothing but the standard library.
"""

import hashlib
from pathlib import Path


def source_hash(directory: str | Path) -> str | None:
    """Hash the C sources of a directory.

    Args:
        directory: where the `.c` and `.h` files lie.

    Returns:
        16 hexadecimal digits, or None if there are no sources (an installed wheel).

    Example:
        >>> source_hash("torchao_superblock/ops/csrc")  # doctest: +SKIP
        '5f0c5d3a0b0e9a41'
    """
    files = sorted(p for p in Path(directory).glob("*") if p.suffix in (".c", ".h"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        # Line endings aside, so that a checkout on another system has the same name.
        text = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.name}:{len(text)}\n".encode())
        digest.update(text)
    return digest.hexdigest()[:16]
