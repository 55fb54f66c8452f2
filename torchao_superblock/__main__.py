"""`python -m torchao_superblock`; see :mod:`torchao_superblock.cli`."""

import sys

from torchao_superblock.cli import main

if __name__ == "__main__":
    sys.exit(main())
