"""A repeated call goes straight to its kernel, unless somebody has a say in it or something about it has changed."""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tests.bsr.common import CountCalls
from tests.ops.common import DEVICES
from tests.reference import random_bsr, relative_error
from torchao_superblock.bsr import BSRLinear
from torchao_superblock.ops import bsr_linear, build_plan, fast_path
from torchao_superblock.ops.cpu import compiled

MODES = {"inference": torch.inference_mode, "no grad": torch.no_grad, "grad": torch.enable_grad}
op = torch.ops.torchao_superblock.bsr_linear


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    fast_path.forget()


class Case:
    """One product with all its operands; `function` and `layer` compute it, `expected` is what they should."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.dense, self.crow, self.col, values = random_bsr(32, 48, 16, 0.5, dtype, device)
        self.values = torch.nn.Parameter(values)
        self.bias = torch.nn.Parameter(torch.randn(32, device=device).to(dtype))
        self.plan = build_plan(self.crow, self.col, 3)
        self.x = torch.randn(1, 48, device=device).to(dtype)
        self.layer = BSRLinear(48, 32, 16, self.crow, self.col, self.values, self.bias)

    def function(self, x: torch.Tensor | None = None) -> torch.Tensor:
        x = self.x if x is None else x
        return bsr_linear(x, self.crow, self.col, self.values, self.bias, None, "none", self.plan)

    def op(self) -> torch.Tensor:
        return op(self.x, self.crow, self.col, self.values, self.bias, None, "none", self.plan)

    def expected(self, x: torch.Tensor | None = None) -> torch.Tensor:
        x = self.x if x is None else x
        return F.linear(x.double(), self.dense.double(), self.bias.double()).detach()

    def device_is_asked(self, call: Callable[..., torch.Tensor], *args: torch.Tensor) -> bool:
        """Whether a call reaches what the op is registered with for the device, behind the dispatcher."""
        reached = []

        def look(frame, event, _) -> None:
            if (
                event == "call"
                and frame.f_code.co_qualname == "_register_dispatch.<locals>.forward"
            ):
                reached.append(frame.f_code.co_filename)

        sys.setprofile(look)
        try:
            call(*args)
        finally:
            sys.setprofile(None)
        return bool(reached)

    def warm_up(self) -> "Case":
        """Call everything in every mode, so that whatever can be remembered is."""
        for mode in MODES.values():
            with mode():
                for _ in range(2):
                    self.function(), self.op(), self.layer(self.x)
        return self


def test_this_torch_has_what_repeated_calls_rest_on() -> None:
    assert fast_path.USABLE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_a_repeated_call_skips_the_dispatcher(mode: str, device: str) -> None:
    case = Case(device)
    calls = [case.function, lambda: case.layer(case.x)]
    if mode != "inference":  # there the op's own way leads to the device and nowhere else
        calls.append(case.op)
    with MODES[mode]():
        assert all(case.device_is_asked(call) for call in calls), "nobody remembers them yet"
    case.warm_up()
    with MODES[mode]():
        assert not any(case.device_is_asked(call) for call in calls)
        for y in (case.function(), case.op(), case.layer(case.x)):
            assert relative_error(y, case.expected()) <= 1e-6
            assert y.requires_grad is (mode == "grad")
            assert y.is_inference() is (mode == "inference")
            assert y.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_modes_tracers_and_profilers_still_see_the_op(mode: str, device: str) -> None:
    case = Case(device).warm_up()

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for call in (case.function, lambda: case.layer(case.x)):
        with MODES[mode]():
            seen = []
            with Functions():
                call()
            assert torch.ops.torchao_superblock.bsr_linear.default in seen
            with CountCalls() as calls:
                call()
            assert calls.count == 1
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU]
            ) as profile:
                call()
            assert "torchao_superblock::bsr_linear" in {e.key for e in profile.key_averages()}
    with MODES[mode](), FakeTensorMode(allow_non_fake_inputs=True):
        assert type(case.function()).__name__ == "FakeTensor"
    if mode != "inference":
        with MODES[mode]():
            graph = make_fx(lambda x: case.layer(x))(case.x).graph
            traced = torch.jit.trace(case.layer, (case.x,), check_trace=False).graph
        assert "torchao_superblock.bsr_linear" in str(graph)
        assert "torchao_superblock::bsr_linear" in str(traced)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_autocast_still_casts(mode: str, device: str) -> None:
    case = Case(device).warm_up()
    with MODES[mode]():
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            for _ in range(2):
                with torch.autocast(device, dtype):
                    assert case.function().dtype == dtype
                    assert case.layer(case.x).dtype == dtype
                assert case.function().dtype == torch.float32
    half = Case(device, torch.bfloat16).warm_up()
    with MODES[mode](), torch.autocast(device, torch.float16):
        assert half.function().dtype == torch.float16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_whatever_changed_since_is_seen(mode: str, device: str) -> None:
    case = Case(device).warm_up()
    factor = 1.0

    def check(x: torch.Tensor, tolerance: float = 1e-6) -> None:
        for y in (case.function(x), case.layer(x)):
            expected = (case.expected(x) - case.bias.double()) * factor + case.bias.double()
            assert y.shape == (*x.shape[:-1], 32) and y.is_contiguous()
            assert relative_error(y, expected) <= tolerance

    with MODES[mode]():
        make = torch.randn
        inputs = [
            make(1, 48, device=device),
            make(3, 48, device=device),
            make(2, 3, 48, device=device),
            make(48, device=device),
            make(48, 3, device=device).t(),
            make(3, 96, device=device)[:, ::2],
            make(1, 48, device=device).expand(3, 48),
            make(4, 100, device=device)[::4, 1:49],  # one row: its stride means nothing
            make(1 + 3 * 48, device=device)[1:].view(3, 48),  # unaligned
            make(0, 48, device=device),
        ]
        for x in [*inputs, *reversed(inputs), *inputs]:
            check(x)
        with torch.no_grad():
            case.values.mul_(2)
        factor = 2.0
        check(case.x)
        case.values.data = case.values.data * 2
        factor = 4.0
        check(case.x)
        with pytest.raises(ValueError, match="col_indices"):
            case.values.data, old = case.values.data[:1].clone(), case.values.data
            case.function()
        with pytest.raises(TypeError, match="one dtype"):
            case.values.data = old.double()
            case.function()
        case.values.data = old
        check(case.x)
        with pytest.raises(ValueError, match="48 features"):
            case.layer(make(1, 47, device=device))
        with pytest.raises(ValueError, match="unknown activation"):
            bsr_linear(case.x, case.crow, case.col, case.values, activation="tanh")
        with pytest.raises(ValueError, match="out_features=16"):
            bsr_linear(case.x, case.crow, case.col, case.values, out_features=16)
        with pytest.raises(TypeError, match="one dtype"):
            bsr_linear(case.x, case.crow, case.col, case.values, case.bias.double())
        with pytest.raises(RuntimeError, match="one device"):
            bsr_linear(case.x, case.crow, case.col, case.values, case.bias.to("meta"))
        y = bsr_linear(case.x, case.crow, case.col, case.values, None, None, "relu")
        without_bias = (case.expected() - case.bias.double()) * factor
        assert relative_error(y, without_bias.relu()) <= 1e-6
        bare = bsr_linear(case.x, case.crow, case.col, case.values)
        assert relative_error(bare, without_bias) <= 1e-6


@pytest.mark.parametrize("kernel", ["pytorch", "baseline"])
def test_another_kernel_of_the_cpu_serves_from_then_on(kernel: str) -> None:
    """What was remembered is of the kernel that was there."""
    if compiled.kernel is None:
        pytest.skip("no compiled kernel serves here")
    case = Case("cpu").warm_up()
    with compiled.using(kernel):
        for _ in range(3):
            for y in (case.function(), case.op(), case.layer(case.x)):
                assert relative_error(y, case.expected()) <= 1e-6
    for y in (case.function(), case.op(), case.layer(case.x)):
        assert relative_error(y, case.expected()) <= 1e-6


@pytest.mark.parametrize("lead", [(1,), (3,), (1, 1), (2, 1, 3)])
@pytest.mark.parametrize("step", [1, 2])
def test_repeated_calls_take_any_strides(lead: tuple[int, ...], step: int) -> None:
    dense, crow, col, values = random_bsr(32, 48, 16, 0.5)
    for seed in range(5):
        torch.manual_seed(seed)
        first = torch.randn(*lead, 48 * step)[..., ::step]
        for x in (first, first.transpose(0, -2) if len(lead) > 1 else first.flip(0)):
            y = bsr_linear(x, crow, col, values)
            assert relative_error(y, x.double() @ dense.double().T) <= 1e-6
            assert y.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_after_calls_without(device: str) -> None:
    case = Case(device).warm_up()
    x = case.x.clone().requires_grad_()
    with torch.no_grad():
        case.function(x), case.layer(x)
    for call in (case.function, case.layer) * 2:
        y = call(x)
        g = torch.randn_like(y)
        grad_x, grad_bias = torch.autograd.grad(y, (x, case.bias), g, retain_graph=True)
        assert relative_error(grad_x, g.double() @ case.dense.double()) <= 1e-6
        assert torch.equal(grad_bias, g[0])
        (grad_values,) = torch.autograd.grad(y, case.values, g)
        assert grad_values.shape == case.values.shape
    case.values.requires_grad_(False)
    case.bias.requires_grad_(False)
    assert not case.function().requires_grad
    assert case.function(x).requires_grad
    (grad,) = torch.autograd.grad(case.function(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    hessian = 2 * case.dense.double().t() @ case.dense.double()
    assert relative_error(second, hessian.sum(0, keepdim=True)) <= 1e-6


def test_checkpointing_recomputes_what_the_first_call_computed() -> None:
    """The first call goes the long way, its recomputation directly: both must save the same tensors."""
    case = Case()
    x = case.x.clone().requires_grad_()
    y = checkpoint(case.layer, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert relative_error(grad, case.dense.double().sum(0, keepdim=True)) <= 1e-6


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_and_forward_mode_after_plain_calls() -> None:
    case = Case(dtype=torch.float64).warm_up()
    weight = case.dense.double()
    gradient = torch.func.grad(lambda x: case.function(x).sum())(case.x)
    torch.testing.assert_close(gradient, weight.sum(0, keepdim=True))
    xs = torch.randn(5, 1, 48, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(case.layer)(xs), case.expected(xs))
    _, tangent = torch.func.jvp(case.function, (case.x,), (case.x,))
    torch.testing.assert_close(tangent, case.x @ weight.t())
    for grad in (torch.no_grad, torch.enable_grad):
        with grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(case.x, torch.ones_like(case.x))
            for y in (case.function(dual), case.layer(dual)):
                tangent = forward_ad.unpack_dual(y).tangent
                torch.testing.assert_close(tangent, weight.sum(1)[None])


def test_compiles_after_plain_calls() -> None:
    case = Case().warm_up()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.layer, fullgraph=True, backend=counter)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            torch.testing.assert_close(compiled(case.x), case.layer(case.x))
    assert "torchao_superblock.bsr_linear" in str(counter.graphs[0].graph)


def test_threads_do_not_share_their_modes() -> None:
    case = Case().warm_up()
    dtypes: dict[str, set[torch.dtype]] = {"plain": set(), "autocast": set()}

    def work(name: str) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            for _ in range(300):
                dtypes[name].add(case.function().dtype)

    threads = [threading.Thread(target=work, args=(name,)) for name in dtypes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dtypes == {"plain": {torch.float32}, "autocast": {torch.bfloat16}}


def test_an_entry_is_kept_although_another_thread_has_dropped_all() -> None:
    key = (torch.Size([1, 2]), torch.Size([3, 4, 5]))
    fast_path._entries.noted(key)
    fast_path.forget()
    fast_path._entries.keep(key, ("entry",))
    assert fast_path._entries[key] == (("entry",),)
    fast_path.forget()


def test_no_tensor_is_kept_alive() -> None:
    case = Case().warm_up()
    tensors = [weakref.ref(t) for t in (case.x, case.crow, case.values, case.plan)]
    del case
    gc.collect()
    assert fast_path.n_entries() and [ref() for ref in tensors] == [None] * 4


def test_new_shapes_do_not_pile_up() -> None:
    case = Case()
    rows = torch.randn(5000, 48)
    with torch.no_grad():
        for M in range(1, 5000):
            case.function(rows[:M])
    assert not any(fast_path.n_entries()), "a shape may never come back: it is only noted"
    assert 1 <= len(fast_path.n_entries()) < 4999
    for stride in range(1, 30):
        case.function(torch.randn(2, 48 * stride)[:, ::stride])
    assert 1 <= max(fast_path.n_entries()) < 28


@pytest.mark.parametrize(
    "name",
    [
        "_dynamo.guards.TensorGuards",
        "_dynamo.guards._empty_strided_cpu",
        "_len_torch_dispatch_stack",
        "_dispatch_keys",
        "_dispatch_tls_local_include_set",
        "_is_torch_function_mode_enabled",
    ],
)
def test_without_what_it_rests_on_every_call_goes_the_long_way(name):
    """Names that a later torch may not have, taken away in a process of its own."""
    script = f"""
import torch
*path, last = "{name}".split(".")
owner = torch._C
for part in path:
    owner = getattr(owner, part)
kept = getattr(owner, last)
delattr(owner, last)
from torchao_superblock.ops import bsr_linear, fast_path
# torch itself needs some of them.
setattr(owner, last, kept)
w = torch.randn(64, 64)
crow, col = torch.tensor([0, 1, 2]).int(), torch.tensor([0, 1]).int()
values = torch.stack([w[:32, :32], w[32:, 32:]]).requires_grad_()
w[:32, 32:] = w[32:, :32] = 0
x = torch.randn(3, 64)
for _ in range(4):
    torch.testing.assert_close(bsr_linear(x, crow, col, values), x @ w.T)
    with torch.no_grad():
        torch.testing.assert_close(bsr_linear(x, crow, col, values), x @ w.T)
assert not any(fast_path.n_entries()) or "{name}" == "_is_torch_function_mode_enabled"
print("served")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "served" in done.stdout, done.stderr[-2000:]
