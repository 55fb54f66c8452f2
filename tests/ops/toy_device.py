"""A device of its own in pure Python, and the one call that has the op served on it. Run as a program by test_backends.

torch's PrivateUse1 is the dispatch key for devices from outside of torch, and `torch.utils.backend_registration` can
set it up without C++. A tensor of the device has no memory: its storage names a CPU tensor that holds the data, and
every operation of torch goes to that one.
"""

from functools import partial
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.reference import random_bsr, relative_error
from torchao_superblock import BSRLinear, backends, swap_to_bsr
from torchao_superblock.ops import Operands, bsr_gated_linear, fast_path, pytorch
from torchao_superblock.ops.backends import Backend, register_backend
from torchao_superblock.ops.break_even import break_even

memory: dict[int, torch.Tensor] = {}  # by storage


def is_toy(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "toy"


def on_device(data: torch.Tensor) -> torch.Tensor:
    tensor = torch._C._acc.create_empty_tensor(data.shape, data.dtype)
    memory[tensor.untyped_storage()._cdata] = data.contiguous()
    return tensor


def everything(op, *args, **kwargs):
    """Any operation: on the CPU tensors behind the device's."""
    by_data: dict[int, torch.Tensor] = {}

    def down(value):
        if not is_toy(value):
            return value
        data = memory[value.untyped_storage()._cdata]
        by_data[id(data)] = value
        return data

    def up(value):
        if not isinstance(value, torch.Tensor):
            return value
        return by_data[id(value)] if id(value) in by_data else on_device(value)

    below, named = pytree.tree_map(down, (args, kwargs))
    if "device" in named:
        named["device"] = torch.device("cpu")
    if op is torch.ops.aten._copy_from.default:
        below[1].copy_(below[0])
        return args[1]
    return pytree.tree_map(up, op(*below, **named))


class Device:
    """`torch.toy`."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device: torch.set_rng_state(state))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


_setup_privateuseone_for_python_backend("toy", Device)
library = torch.library.Library("_", "IMPL")
library.fallback(everything, "PrivateUse1")
library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
# Elsewhere it is made of operations that resize what they write to, which tensors without memory cannot do.
aten = torch.library.Library("aten", "IMPL")
aten.impl("arange", partial(everything, torch.ops.aten.arange.default), "PrivateUse1")

calls: list[str] = []


def computed_by(name: str):
    function = getattr(pytorch, name)

    def compute(*args):
        calls.append(name)
        assert all(is_toy(arg) for arg in args if isinstance(arg, torch.Tensor))
        below = [arg.cpu() if isinstance(arg, torch.Tensor) else arg for arg in args]
        return function(*below).to("toy")

    return compute


backend = SimpleNamespace(
    forward=computed_by("forward"),
    grad_x=computed_by("grad_x"),
    grad_values=computed_by("grad_values"),
    backend_info=lambda: {"name": "toy", "reason": "a test asked for it"},
)
assert "toy" not in backends() and not break_even("toy", (16, 16), torch.float32).measured

# All that it takes.
register_backend(Backend("toy", backend, break_even_points=lambda dtype, _: {16: 0.25}))

assert backends()["toy"] == {"name": "toy", "reason": "a test asked for it"}
assert break_even("toy", (32, 16), torch.float32) == (0.25, True, "toy")

dense, crow, col, values = random_bsr(32, 64, 16, 0.5)
bias = torch.randn(32)
layer = BSRLinear(64, 32, 16, crow, col, values, bias).to("toy")
assert layer.values.device.type == "toy"
x = torch.randn(2, 5, 64)


def same(toy: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return is_toy(toy) and relative_error(toy.detach().cpu(), expected.double()) <= tolerance


# Forward and backward, the first time and when calls are repeated.
for _ in range(4):
    calls.clear()
    on_toy = x.to("toy").requires_grad_()
    y = layer(on_toy)
    assert same(y, x @ dense.T + bias)
    grad = torch.randn(2, 5, 32)
    y.backward(grad.to("toy"))
    assert calls == ["forward", "grad_x", "grad_values"]
    assert same(on_toy.grad, grad @ dense)
    flat = grad.reshape(-1, 32)
    assert same(layer.bias.grad, flat.sum(0))
    blocks = (flat.T @ x.reshape(-1, 64)).view(2, 16, 4, 16).transpose(1, 2)
    rows = torch.repeat_interleave(torch.arange(2), crow.diff())
    assert same(layer.values.grad, blocks[rows, col.long()])
    layer.zero_grad()

# A repeated call goes past the dispatcher, in a mode of its own each.
kinds = sum(fast_path.n_entries())
assert kinds > 0
with torch.inference_mode():
    for _ in range(3):
        assert same(layer(x.to("toy")), x @ dense.T + bias)
assert sum(fast_path.n_entries()) == kinds + 1

# Autocast casts as it does elsewhere.
with torch.autocast("toy", torch.bfloat16):
    y = layer(x.to("toy"))
assert y.dtype == torch.bfloat16 and same(y, x @ dense.T + bias, 1e-2)

# The op of gated MLPs is two products there, as it brings no kernel for both.
operands = [(layer.crow_indices, layer.col_indices, layer.values.detach(), None)] * 2
z = x @ dense.T
gated = torch.ops.torchao_superblock.bsr_gated_linear_silu(x.to("toy"), *operands[0], *operands[1])
assert same(gated, nn.functional.silu(z) * z)
with torch.autocast("toy", torch.bfloat16), torch.no_grad():
    gated = bsr_gated_linear(x.to("toy"), Operands(*operands[0]), Operands(*operands[1]), "silu")
assert gated.dtype == torch.bfloat16 and same(gated, nn.functional.silu(z) * z, 2e-2)

# A swap asks the device's own table.
model = nn.Sequential(nn.Linear(64, 32))
with torch.no_grad():
    model[0].weight.copy_(dense)
model.to("toy")
assert len(swap_to_bsr(model).swapped) == 1 and isinstance(model[0], BSRLinear)
assert same(model(x.to("toy")), x @ dense.T + model[0].bias.detach().cpu())

print("served")
