"""All gradients of the op at once: the op, a repeated backward, layers that keep what comes before an activation."""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.ops.common import DEVICES
from tests.reference import TOLERANCE, block_mask, random_bsr, relative_error
from torchao_superblock.bsr import BSRLinear
from torchao_superblock.bsr.format import bsr_to_dense
from torchao_superblock.ops import ACTIVATIONS, autograd, bsr_linear, build_plan, fast_path
from torchao_superblock.ops.backends import backend_of

op = torch.ops.torchao_superblock.bsr_linear_backward
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    fast_path.forget()


class Case:
    """A product with an activation, whose parameters and input have gradients, and the float64 reference of these."""

    def __init__(self, dtype=torch.float32, device="cpu", *, activation="none", bias=True) -> None:
        self.mask = block_mask(3, 4, 0.5)
        dense, self.crow, self.col, values = random_bsr(
            48, 64, 16, mask=self.mask, dtype=dtype, device=device
        )
        self.dense, self.values = dense.double(), torch.nn.Parameter(values)
        self.bias = torch.nn.Parameter(torch.randn(48, device=device).to(dtype)) if bias else None
        self.plan, self.activation = build_plan(self.crow, self.col, 4), activation
        self.layer = BSRLinear(
            64, 48, 16, self.crow, self.col, self.values, self.bias, activation=activation
        )
        self.dtype, self.device = dtype, device

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def function(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.crow, self.col, self.values, self.bias)
        return bsr_linear(x, *weight, None, self.activation, self.plan)

    def reference(self, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        x, grad = x.detach().double(), grad.double()
        z = x @ self.dense.T
        if self.bias is not None:
            z = z + self.bias.detach().double()
        z.requires_grad_()
        (dz,) = torch.autograd.grad(ACTIVATIONS[self.activation](z), z, grad)
        flat = dz.reshape(-1, 48)
        blocks = (flat.T @ x.reshape(-1, 64)).view(3, 16, 4, 16).transpose(1, 2)
        return [dz @ self.dense, blocks[self.mask.to(x.device)], flat.sum(0)]

    def check(self, call: Callable, x: torch.Tensor, grad: torch.Tensor, times: int = 3) -> None:
        """Compare each of some calls, which go other ways the more often they are repeated."""
        tensors = [t for t in (x, self.values, self.bias) if t is not None and t.requires_grad]
        expected = dict(
            zip(map(id, (x, self.values, self.bias)), self.reference(x, grad), strict=True)
        )
        for _ in range(times):
            found = torch.autograd.grad(call(x), tensors, grad)
            for tensor, one in zip(tensors, found, strict=True):
                assert one.dtype == self.dtype and one.shape == tensor.shape and one.is_contiguous()
                if one.numel():
                    assert relative_error(one, expected[id(tensor)]) <= TOLERANCE[self.dtype]


class Calls(TorchDispatchMode):
    """Sees the ops go by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def asks(call: Callable, name: str = "_backward") -> bool:
    """Whether a call reaches what the op is registered with for a device, behind the dispatcher."""
    reached = []

    def look(frame, event, _) -> None:
        if event == "call" and frame.f_code.co_qualname == name:
            reached.append(frame.f_code.co_filename.endswith("gradients.py"))

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return any(reached)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_first_and_repeated_backwards_match_float64(activation, dtype, device):
    case = Case(dtype, device, activation=activation)
    for lead in ((1,), (37,), (3, 5), ()):
        x = case.tensor(*lead, 64).requires_grad_()
        for call in (case.function, case.layer):
            case.check(call, x, case.tensor(*lead, 48))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_any_strides(activation, device):
    case = Case(device=device, activation=activation)
    wide, tall = case.tensor(20, 100), case.tensor(64, 20)
    grads = [
        case.tensor(20, 48),
        case.tensor(1, 1).expand(20, 48),
        case.tensor(20, 1).expand(20, 48),
        case.tensor(48, 20).T,
        wide[:, 3:51],
        wide[:, ::2][:, :48],
    ]
    for x, grad in itertools.product((case.tensor(20, 64), wide[:, 1:65], tall.T), grads):
        case.check(case.function, x.detach().requires_grad_(), grad)
        case.check(case.layer, x.detach().requires_grad_(), grad)
    x = case.tensor(4, 5, 64).transpose(0, 1).requires_grad_()
    for grad in (case.tensor(5, 4, 48), case.tensor(4, 5, 48).transpose(0, 1)):
        case.check(case.layer, x, grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_what_is_not_asked_for_is_not_computed(activation, device):
    for bias in (True, False):
        case = Case(device=device, activation=activation, bias=bias)
        parts = ["x", "values", "bias"][: 2 + bias]
        for asked in itertools.product((True, False), repeat=len(parts)):
            x = case.tensor(6, 64)
            tensors = (x, case.values, case.bias)
            for tensor, wanted in zip(tensors, asked, strict=False):
                tensor.requires_grad_(wanted)
            if any(asked):
                for call in (case.function, case.layer):
                    case.check(call, x, case.tensor(6, 48))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_no_tokens(activation, device):
    case = Case(device=device, activation=activation)
    for lead in ((0,), (2, 0)):
        x = case.tensor(*lead, 64).requires_grad_()
        for call in (case.function, case.layer):
            case.check(call, x, case.tensor(*lead, 48))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_repeated_backward_skips_the_dispatcher(activation, device):
    case = Case(device=device, activation=activation)
    x, grad = case.tensor(6, 64).requires_grad_(), case.tensor(6, 48)

    def backward(call: Callable = case.layer, x: torch.Tensor = x) -> Callable:
        y = call(x)
        return lambda: torch.autograd.grad(y, (x, case.values, case.bias), grad)

    # Or a GPU's run in a thread that is not seen.
    with torch.autograd.set_multithreading_enabled(False):
        for call in (case.layer, case.function):
            fast_path.forget()
            assert asks(backward(call))
            backward(call)()
            assert not asks(backward(call))
            assert asks(backward(call, case.tensor(64, 6).T.requires_grad_()))
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                backward(call)()
            assert "torchao_superblock::bsr_linear_backward" in {e.key for e in seen.key_averages()}
            one = backward(call)
            with Calls() as calls:
                one()
            assert op.default in calls.seen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_repeated_call_of_the_op_itself_skips_the_checks(activation, device):
    """As code that was compiled calls it."""
    case = Case(device=device, activation=activation)
    x, grad = case.tensor(6, 64), case.tensor(6, 48)
    weight = (case.crow, case.col, case.values.detach(), case.bias.detach())
    z = None if activation == "none" else bsr_linear(x, *weight, None, "none", case.plan)
    found = []

    def call(x: torch.Tensor = x) -> None:
        found.append(op(grad, x, *weight, activation, z, case.plan, [True, True, True]))

    assert asks(call) and asks(call) and not asks(call)
    assert asks(lambda: call(case.tensor(64, 6).T)) and not asks(call)
    references = case.reference(x, grad)
    for grads in (*found[:3], found[-1]):
        for one, reference in zip(grads, references, strict=True):
            assert relative_error(one, reference) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["none", "gelu", "relu"])
def test_autocast_computes_what_casts_by_hand_do(activation, device):
    case = Case(device=device, activation=activation)
    x, grad = case.tensor(6, 64).requires_grad_(), case.tensor(6, 48).bfloat16()
    tensors = (x, case.values, case.bias)
    weight = (case.crow, case.col, case.values.bfloat16(), case.bias.bfloat16())
    z = bsr_linear(x.bfloat16(), *weight, None, "none", case.plan)
    expected = torch.autograd.grad(ACTIVATIONS[activation](z), tensors, grad)

    def step(call: Callable) -> tuple[torch.Tensor, ...]:
        with torch.autocast(device, torch.bfloat16):
            y = call(x)
        assert y.dtype == torch.bfloat16
        return torch.autograd.grad(y, tensors, grad)

    for _ in range(4):
        for call in (case.layer, case.function):
            found = step(call)
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == torch.float32
                assert relative_error(one, other.double()) <= TOLERANCE[torch.bfloat16]
    reached = []

    def look(frame, event, _) -> None:
        if event == "call" and frame.f_code.co_qualname.endswith(
            "_register_dispatch.<locals>.forward"
        ):
            reached.append(frame)

    sys.setprofile(look)
    try:
        step(case.layer)
    finally:
        sys.setprofile(None)
    assert not reached, "a repeated call in an autocast region goes past the dispatcher, too"


@pytest.mark.parametrize("activation", ["none", "gelu", "quick_gelu", "relu"])
def test_the_op_passes_opcheck(activation):
    case = Case(activation=activation)
    args = (case.crow, case.col, case.values.detach(), case.bias.detach(), activation)
    x, grad, z = case.tensor(2, 3, 64), case.tensor(2, 3, 48), case.tensor(2, 3, 48)
    for needs in ((True, True, True), (False, True, False), (True, False, True)):
        for before, plan in ((None, None), (z, case.plan)):
            before = None if activation == "none" else before
            torch.library.opcheck(op.default, (grad, x, *args, before, plan, needs))


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_the_op_is_differentiable_itself(activation):
    case = Case(torch.float64, activation=activation)
    index = (case.crow, case.col)
    x, grad = case.tensor(2, 64).requires_grad_(), case.tensor(2, 48).requires_grad_()

    def call(grad, x, values, bias):
        return op(grad, x, *index, values, bias, activation, None, None, (True, True, True))

    inputs = (grad, x, case.values, case.bias)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_layer_with_an_activation_is_differentiable_twice(activation):
    case = Case(torch.float64, activation=activation)

    def call(x, values, bias):
        return torch.func.functional_call(case.layer, {"values": values, "bias": bias}, (x,))

    inputs = (case.tensor(2, 64).requires_grad_(), case.values, case.bias)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_layer_keeps_no_more_than_its_activation_would(activation):
    case = Case(activation=activation)
    x = case.tensor(6, 64)
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = case.layer(x)
    wide = [tensor for tensor in kept if tensor.shape == y.shape]
    assert len(wide) == 1
    assert (wide[0].data_ptr() == y.data_ptr()) is (activation == "relu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_few_stored_numbers_are_multiplied_again_rather_than_kept(monkeypatch, activation, dtype):
    cpu = dataclasses.replace(backend_of("cpu"), recomputed_row=64)
    monkeypatch.setattr(autograd, "backend_of", lambda device_type: cpu)
    case = Case(dtype, activation=activation)
    x, grad, kept = case.tensor(6, 64).requires_grad_(), case.tensor(6, 48), []
    case.check(case.layer, x, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = case.layer(x)
    wide = [tensor for tensor in kept if tensor.shape == y.shape]
    again = activation == "gelu" and dtype == torch.bfloat16
    assert len(wide) == (0 if again else 1)
    with torch.autocast("cpu", torch.bfloat16):
        fast = case.layer(x)
    assert fast.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_checkpointing(activation, reentrant):
    case = Case(activation=activation)

    def call(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(case.layer, x, use_reentrant=reentrant)

    x, grad = case.tensor(6, 64).requires_grad_(), case.tensor(6, 48)
    for _ in range(3):
        if not reentrant:
            case.check(call, x, grad, times=1)
            continue
        x.grad = case.values.grad = case.bias.grad = None
        call(x).backward(grad)
        found = (x.grad, case.values.grad, case.bias.grad)
        for one, expected in zip(found, case.reference(x, grad), strict=True):
            assert relative_error(one, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("watched", ["forward", "backward"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_checkpoint_of_which_a_mode_sees_only_one_half(activation, watched):
    case = Case(activation=activation)
    x, grad = case.tensor(6, 64).requires_grad_(), case.tensor(6, 48)
    modes = {"forward": contextlib.nullcontext, "backward": contextlib.nullcontext, watched: Calls}
    for _ in range(3):
        with modes["forward"]():
            y = checkpoint(case.layer, x, use_reentrant=False)
        with modes["backward"]():
            found = torch.autograd.grad(y, (x, case.values, case.bias), grad)
        for one, expected in zip(found, case.reference(x, grad), strict=True):
            assert relative_error(one, expected) <= TOLERANCE[torch.float32]


def test_a_write_between_forward_and_backward_is_noticed():
    case = Case(activation="gelu")
    x = case.tensor(6, 64).requires_grad_()
    for _ in range(3):
        for written in (case.values, case.col):
            y = case.layer(x)
            with torch.no_grad():
                written.mul_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_compilers_see_one_op_and_an_activation_of_their_own(activation):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    case = Case(activation=activation)
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        case.layer, fullgraph=True, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    )
    case.check(compiled, case.tensor(6, 64).requires_grad_(), case.tensor(6, 48))
    forward, backward = (
        [node.target for node in graph.graph.nodes if node.op == "call_function"]
        for graph in graphs
    )
    assert torch.ops.torchao_superblock.bsr_linear.default in forward
    assert backward.count(op.default) == 1
    assert (torch.ops.aten.gelu_backward.default in backward) is (activation == "gelu")
    assert torch.ops.aten.sum.dim_IntList in backward


def test_what_does_not_fit_is_refused():
    case = Case()
    x, grad = case.tensor(6, 64), case.tensor(6, 48)

    def call(grad=grad, x=x, bias=case.bias, activation="gelu", z=None):
        with torch.no_grad():
            weight = (case.crow, case.col, case.values, bias)
            op(grad, x, *weight, activation, z, None, (True, True, True))

    call()
    for error, message, wrong in (
        (ValueError, "does not fit 3 block rows", {"grad": case.tensor(6, 49)}),
        (ValueError, "0-dim", {"grad": grad[0, 0]}),
        (ValueError, "leading dimensions", {"grad": case.tensor(5, 48)}),
        (ValueError, "differ in shape", {"z": case.tensor(6, 47)}),
        (TypeError, "grad is torch.float64", {"grad": grad.double()}),
        (TypeError, "z is torch.float64", {"z": grad.double()}),
        (ValueError, "unknown activation", {"activation": "swish"}),
        (ValueError, "bias must have shape", {"bias": case.tensor(47)}),
        (RuntimeError, "on one device", {"grad": grad.to("meta")}),
    ):
        with pytest.raises(error, match=message):
            call(**wrong)


def test_a_dense_model_and_a_swapped_one_train_alike():
    case = Case(activation="gelu")
    x, weight = case.tensor(6, 64), bsr_to_dense(case.crow, case.col, case.values, (48, 64))
    weight, bias = weight.detach().requires_grad_(), case.bias.detach().clone().requires_grad_()
    optimizers = [
        torch.optim.SGD(parameters, 0.1)
        for parameters in ([weight, bias], [case.values, case.bias])
    ]
    keep = (weight != 0).detach()
    for _ in range(5):
        losses = [F.gelu(F.linear(x, weight, bias)).square().mean(), case.layer(x).square().mean()]
        torch.testing.assert_close(losses[1], losses[0])
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        weight.grad *= keep
        for optimizer in optimizers:
            optimizer.step()
