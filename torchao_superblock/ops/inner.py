"""The op as compiled programs call it: checked while they are traced, with nothing left to decide when they run.

A call of one token takes a kernel a few microseconds and the host as long: a compiler's own `addmm` is called past the
dispatcher, while the public op passes eight arguments through it, finds out once more whether anybody wants gradients,
and what kind of call it is. Inductor knows all of that. So below autograd, and only there, it is given one of these
instead (`aot.py` says when): an op for each activation, of plain 2-D tensors, without a kernel for autograd. Exported
programs never contain it, so that it may change.

Measured on a CPU host, in units of a compiled `F.linear` of one token: 3.8 for the public op and 1.7 to 2.1 for this
one, both with their work; with an empty kernel 1.09 for an op of two tensors and 0.07 to 0.09 more for each further
one. So the indices stay the two tensors that they are. Packed into one they would be that much faster, and compiled
code would go by a copy: one that nobody renews where an index is replaced (`torch.func.functional_call`) or written to.
An activation has an op of its own, since an argument for it would cost as much as a tensor, and so has a weight whose
last block row is not whole; the plan is for GPUs.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torchao_superblock.ops.activations import ACTIVATIONS
from torchao_superblock.ops.backends import Backend, on_each_backend
from torchao_superblock.ops.flops import register_formulas

_NAMESPACE = "torchao_superblock"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
_OPERANDS = "Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values"
_SCHEMA = f"({_OPERANDS}, Tensor? bias=None) -> Tensor"
_PADDED_SCHEMA = f"({_OPERANDS}, Tensor? bias, SymInt out_features) -> Tensor"


def _fake(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    out_features: int | None = None,
) -> Tensor:
    N = (crow_indices.shape[0] - 1) * values.shape[1] if out_features is None else out_features
    return x.new_empty((x.shape[0], N))


def _define(name: str, schema: str) -> Callable[..., Tensor]:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{_NAMESPACE}::{name}", _fake, lib=_library)
    # Not the fallback, which would look at each argument for gradients.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


OPS: dict[str, Callable[..., Tensor]] = {
    activation: _define(f"bsr_product_{activation}", _SCHEMA) for activation in ACTIVATIONS
}
"""Activation -> the op."""
PADDED_OPS: dict[str, Callable[..., Tensor]] = {
    activation: _define(f"bsr_padded_product_{activation}", _PADDED_SCHEMA)
    for activation in ACTIVATIONS
}
"""Activation -> the op for a weight whose last block row is padded."""

register_formulas()


class Twin:
    """A backend whose forward is a call of these ops: what Inductor traces where a backend runs itself."""

    @staticmethod
    def forward(
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        bias: Tensor | None,
        activation: str,
        plan: Tensor | None,
        out_features: int,
    ) -> Tensor:
        """As :class:`torchao_superblock.ops.backends.BackendModule` has it."""
        if out_features == (crow.shape[0] - 1) * values.shape[1]:
            return OPS[activation](x, crow, col, values, bias)
        return PADDED_OPS[activation](x, crow, col, values, bias, out_features)


def twin_of(backend: Backend) -> type[Twin] | None:
    """What stands for a backend in a compiled program.

    Args:
        backend: of the operands' device.

    Returns:
        None where the public op stays, because the backend chooses kernels by the plan and leaves closures that repeat
        such a choice.
    """
    return None if backend.leaves_closures else Twin


def _register(backend: Backend) -> None:
    def run(
        activation: str,
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
        out_features: int | None = None,
    ) -> Tensor:
        if out_features is None:
            out_features = (crow.shape[0] - 1) * values.shape[1]
        return backend.module.forward(x, crow, col, values, bias, activation, None, out_features)

    for activation in OPS:
        for kind in ("product", "padded_product"):
            name = f"bsr_{kind}_{activation}"
            _library.impl(name, partial(run, activation), backend.dispatch_key)


on_each_backend(_register)
