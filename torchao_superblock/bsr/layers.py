"""Which module type becomes which at the swap: the only place that says so.

A line of :func:`register_twin` makes a type known; why a single module of it cannot be converted all
the same is its twin's own rule. The table itself lies in `common/`, where the summary of a sparsifier
can ask it without importing this half.
"""

import importlib
import warnings

from torch import nn

from torchao_superblock.bsr.linear import LINEAR_TYPES, BSRLinear
from torchao_superblock.common.swappable import TWINS, Twin, register_twin

for _cls in LINEAR_TYPES:
    register_twin(_cls, BSRLinear, "weight")

INTEGRATIONS: dict[str, str] = {
    # save_pretrained of a model that was swapped: a folder that from_pretrained can load
    "transformers": "torchao_superblock.integrations.transformers",
}
"""Root package of an outside library -> the module that makes us known to it; imported when a class of it is met."""


def twin_of(cls: type[nn.Module]) -> Twin | None:
    """What modules of exactly this type become, or None if they stay as they are."""
    root = cls.__module__.partition(".")[0]
    if cls not in TWINS and root in INTEGRATIONS:
        try:
            importlib.import_module(INTEGRATIONS[root])
        except (
            ImportError
        ) as error:  # a release that it does not work with; layers of torch are as they are
            warnings.warn(
                f"{root} and block-sparse layers do not know each other: {error}", stacklevel=3
            )
    return TWINS.get(cls)
