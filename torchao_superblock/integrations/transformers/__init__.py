"""Models of transformers: block sparsity in `from_pretrained`, `save_pretrained` and `Trainer`.

A folder of a swapped model is an ordinary one: `config.json`, whose `quantization_config` describes the block-sparse
layers, and safetensors, in shards where they are large. In the files

    LAYER.weight         (stored blocks, rows, cols), what a :class:`BSRLinear` calls `values`
    LAYER.crow_indices   int32 (block rows + 1,)
    LAYER.col_indices    int32 (stored blocks,)
    LAYER.bias           (out_features,), if the layer has one

`weight` is the name that a dense model looks for, and has three dimensions: a process that has not imported this module
knows nothing of `quantization_config`, finds that sizes differ, and raises, where a missing `weight` would be random
numbers and a warning.
"""

from __future__ import annotations

import re

VERSIONS = ("5.22", "6")
"""The first release of transformers that this works with, and the first that it does not."""

_INSTALL = (
    f"pip install 'torchao_superblock[transformers]' (transformers>={VERSIONS[0]},<{VERSIONS[1]})"
)

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f"torchao_superblock.integrations.transformers needs transformers: {_INSTALL}"
    ) from error

_release = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
if not tuple(map(int, VERSIONS[0].split("."))) <= _release < (int(VERSIONS[1]),):
    raise ImportError(
        f"torchao_superblock.integrations.transformers works with transformers from {VERSIONS[0]} to before "
        f"{VERSIONS[1]}, whose loading code it follows; {transformers.__version__} is installed: {_INSTALL}"
    )

from torchao_superblock.integrations.transformers.config import BlockSparseConfig  # noqa: E402
from torchao_superblock.integrations.transformers.loading import BlockSparseHfQuantizer  # noqa: E402
from torchao_superblock.integrations.transformers.saving import install  # noqa: E402
from torchao_superblock.integrations.transformers.trainer import (  # noqa: E402
    SparseTrainerMixin,
    SparsifierCallback,
)

__all__ = [
    "BlockSparseConfig",
    "BlockSparseHfQuantizer",
    "SparseTrainerMixin",
    "SparsifierCallback",
]

install()
