"""`FoldedActivation`: the place of an activation that the layer before it applies."""

from torch import nn


def activation_name(module: nn.Module) -> str | None:
    """What the op calls this activation module, or None if it is not one that the op can apply."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))


def activation_module(name: str) -> nn.Module:
    """The module that :func:`activation_name` calls by this name."""
    if name in ("gelu", "gelu_tanh"):
        return nn.GELU("tanh" if name == "gelu_tanh" else "none")
    return {"relu": nn.ReLU, "silu": nn.SiLU}[name]()


class FoldedActivation(nn.Identity):
    """Keeps the place of an activation that the :class:`BSRLinear` before it applies.

    Args:
        module: the `nn.ReLU`, `nn.GELU` or `nn.SiLU` that stood here.

    Attributes:
        activation: its name, as in `BSRLinear.activation`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.activation = activation_name(module)
        self.train(module.training)

    def extra_repr(self) -> str:
        return repr(self.activation)
