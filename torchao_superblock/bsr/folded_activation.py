"""Activations that a layer can apply itself, and `FoldedActivation`, which keeps the place of one that it does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchao_superblock.common.modules import has_hooks
from torchao_superblock.common.names import by_class
from torchao_superblock.ops.activations import ACTIVATIONS, quick_gelu

Activation = nn.Module | Callable[[Tensor], Tensor]

# Class, or its qualified name -> what the op calls it, or what tells that for a single module.
_MODULES: dict[type | str, str | Callable[[Any], str | None]] = {}
_FUNCTIONS: dict[Callable, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    quick_gelu: "quick_gelu",
}
# Those whose own formula gives other bits than the op's.
_TO_ROUNDING: dict[type | str, bool] = {}


def register_activation(
    cls: type[nn.Module] | str,
    activation: str | Callable[[Any], str | None],
    *,
    to_rounding: bool = False,
) -> None:
    """Say which activation of the op modules of exactly this class compute.

    Args:
        cls: the class, or its qualified name, so that its library need not be imported.
        activation: what `BSRLinear.activation` calls it; or a function that is given the module and returns that, or
            None where the op has none for it.
        to_rounding: the module computes the same function by another formula; reports say so.

    Raises:
        ValueError: the op has no activation of that name.

    Example:
        >>> class Swish(nn.Module):
        ...     def forward(self, x):
        ...         return x * torch.sigmoid(x)
        >>> register_activation(Swish, "silu", to_rounding=True)
    """
    if isinstance(activation, str) and (activation == "none" or activation not in ACTIVATIONS):
        raise ValueError(
            f"register_activation: the op has no activation {activation!r}; choose one of "
            f"{', '.join(repr(name) for name in ACTIVATIONS if name != 'none')}"
        )
    _MODULES[cls] = activation
    _TO_ROUNDING[cls] = to_rounding


class QuickGELU(nn.Module):
    """:func:`torchao_superblock.ops.activations.quick_gelu`, of which torch has no module."""

    def forward(self, x: Tensor) -> Tensor:
        return quick_gelu(x)


register_activation(QuickGELU, "quick_gelu")
register_activation(nn.ReLU, "relu")
register_activation(nn.SiLU, "silu")
register_activation(
    nn.GELU, lambda module: {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
)


def activation_name(activation: object) -> str | None:
    """What the op calls this module or function, or None if it is not one that the op can apply."""
    if isinstance(activation, nn.Module):
        name = by_class(_MODULES, type(activation))
        return name if name is None or isinstance(name, str) else name(activation)
    if isinstance(activation, functools.partial):
        is_tanh = (activation.func, activation.args, activation.keywords) == (
            F.gelu,
            (),
            {"approximate": "tanh"},
        )
        return "gelu_tanh" if is_tanh else None
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:  # not hashable
        return None


def is_equal_to_rounding(activation: Activation) -> bool:
    """Whether the op's own formula for this activation may give other bits."""
    return bool(by_class(_TO_ROUNDING, type(activation)))


def activation_module(name: str) -> nn.Module:
    """A module for which :func:`activation_name` gives this name."""
    if name in ("gelu", "gelu_tanh"):
        return nn.GELU("tanh" if name == "gelu_tanh" else "none")
    return {"relu": nn.ReLU, "silu": nn.SiLU, "quick_gelu": QuickGELU}[name]()


class FoldedActivation(nn.Identity):
    """Keeps the place of an activation that the :class:`BSRLinear` before it applies.

    Where that layer does not, because a hook watches what comes out of it or goes in here, or because its `activation`
    was set to `"none"`, or another layer is in its place, the activation is applied here.

    Args:
        original: the module or function that stood here.
        owner: the module that calls both.
        path: of the layer, as `owner.get_submodule` has it.

    Attributes:
        activation: its name, as in `BSRLinear.activation`.
        original: what stood here; None in a pickle of an earlier release.

    Raises:
        RuntimeError: in a forward, if something was put around the layer that does more than call it (a LoRA adapter):
            what that adds would come after the activation.
    """

    # In tuples, which nn.Module does not take for children.
    _original: tuple[Activation] | None = None
    _front: tuple[nn.Module, str] | None = None

    def __init__(self, original: Activation, owner: nn.Module, path: str) -> None:
        super().__init__()
        self.activation = activation_name(original)
        self._original = (original,)
        self._front = (owner, path)
        self.train(getattr(original, "training", owner.training))

    @property
    def original(self) -> Activation | None:
        return None if self._original is None else self._original[0]

    @property
    def owner(self) -> nn.Module | None:
        """The module that calls the layer and the activation; None in a pickle of an earlier release."""
        return None if self._front is None else self._front[0]

    def in_front(self) -> nn.Module | None:
        """What is in the layer's place now; None if nothing is, or that is not known."""
        if self._front is None:
            return None
        module, path = self._front
        for name in path.split("."):
            module = module._modules.get(name)
            if module is None:
                return None
        return module

    def layer(self) -> nn.Module | None:
        """The block-sparse layer in front, also inside of wrappers that do nothing but call it; None if there is none.

        Raises:
            RuntimeError: the layer applies the activation, and is wrapped in something that may do more.
        """
        outer = module = self.in_front()
        while module is not None and not hasattr(type(module), "applied_activation"):
            inside = [module._modules[name] for name in _INSIDE if name in module._modules]
            if not inside:
                break
            module = inside[0]
        else:
            return module
        if any(_applied(part) not in (None, "none") for part in module.modules()):
            raise RuntimeError(
                f"{self._front[1]!r} applies {self.activation} itself, and a {type(outer).__name__} was put around it, "
                "whose part would come after the activation; set the `activation` of the layer inside to 'none', and "
                "it is applied here, or swap with fuse_activations=False"
            )
        return None

    @property
    def is_left_to_itself(self) -> bool:
        """Whether the layer in front is known not to have this activation."""
        return (
            self._front is not None and getattr(self.layer(), "activation", "") != self.activation
        )

    def forward(self, input: Tensor) -> Tensor:
        if self._front is None or _applied(self.layer()) == self.activation:
            return input
        return self._original[0](input)

    def extra_repr(self) -> str:
        return repr(self.activation)


def _applied(module: nn.Module | None) -> str | None:
    """The activation that a block-sparse layer applies now; None for anything else."""
    return getattr(module, "applied_activation", None)


# Where wrappers that add nothing to a call keep what they call: torch.compile, checkpoint_wrapper, FSDP.
_INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def fold_into(layer: nn.Module, place: FoldedActivation) -> None:
    """Let a :class:`BSRLinear` apply the activation whose place is kept."""
    layer.activation = place.activation
    layer.place = (place,)


def is_watched(layer: nn.Module, place: nn.Module) -> bool:
    """Whether a hook would see the activation applied too early: behind the layer, or in front of its place."""
    return bool(
        layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks
    ) or has_hooks(place)
