"""How a kernel is launched again, seen by a launcher that stands in for Triton's."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

import triton

from torchao_superblock.ops.cuda import launch
from torchao_superblock.ops.cuda.launch import Described, Kernel, row_major


class Function:
    """A kernel of one constant: its first launch compiles it, as Triton's does."""

    arg_names = ("descriptor", "x_ptr", "n", "BLOCK")

    def __init__(self, compiled) -> None:
        self.compiled, self.launches = compiled, []

    def __getitem__(self, grid):
        def first(*args, **options):
            self.launches.append((grid, args, options))
            return self.compiled

        return first


class Compiled:
    """A compiled kernel: launched by `[grid]`, or by what stands behind `run`."""

    function, packed_metadata = 17, "metadata"

    def __init__(self, run) -> None:
        self.run, self.launches = run, []

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(launch, "_stream", lambda index: 100 + index)
    monkeypatch.setattr(launch, "DIRECT_LAUNCH", True)
    monkeypatch.setattr(launch, "_C_LAUNCH", False)


def c_launcher(calls: list, expands: bool) -> SimpleNamespace:
    """What Triton 3.6 has behind `CompiledKernel.run`; with descriptors its C function is wrapped once more."""

    class CFunction:
        def __call__(self, *args) -> None:
            calls.append(args)

    launcher, tensordesc_meta = CFunction(), ["layout"]

    def wrapped(*args) -> None:
        raise AssertionError((launcher, tensordesc_meta))

    sizes = {"global_scratch_size": 0, "profile_scratch_size": 0}
    flags = {"launch_cooperative_grid": False, "launch_pdl": True}
    return SimpleNamespace(launch=wrapped if expands else launcher, **sizes, **flags)


def test_strides_of_contiguous_tensors():
    for shape in ((), (3,), (2, 3), (4, 2, 3), (2, 1, 5)):
        assert row_major(shape) == torch.empty(shape).stride()


def test_a_second_launch_calls_what_the_first_found(on_cpu):
    calls = []
    compiled = Compiled(lambda *args: calls.append(args))
    function = Function(compiled)
    kernel = Kernel(function, {"BLOCK": 32}, num_warps=4)
    described = Described(lambda tensor: (("descriptor", tensor.data_ptr()),))
    x, other = torch.ones(4), torch.ones(4)
    for tensor in (x, other):
        kernel((2, 1, 1), 0, (tensor,), 4, described=described, of=(tensor,))
    descriptor = ("descriptor", x.data_ptr())
    assert function.launches == [((2, 1, 1), (descriptor, x, 4, 32), {"num_warps": 4})]
    address = other.data_ptr()
    head = (2, 1, 1, 100, 17, "metadata", None, None, None)
    assert calls == [(*head, ("descriptor", address), address, 4, 32)]


def test_a_hook_sees_each_launch(on_cpu, monkeypatch):
    calls = []
    compiled = Compiled(lambda *args: calls.append(args))
    kernel = Kernel(Function(compiled), {"BLOCK": 32})
    x = torch.ones(4)
    kernel((1, 1, 1), 0, (x,), 4)
    hook = SimpleNamespace(calls=[print])
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)
    kernel((1, 1, 1), 0, (x,), 4)
    assert compiled.launches == [((1, 1, 1), (x, 4, 32))] and not calls
    hook.calls.clear()
    kernel((1, 1, 1), 0, (x,), 4)
    assert len(calls) == 1


def test_the_c_function_takes_descriptors_that_are_kept_by_address(on_cpu, monkeypatch):
    monkeypatch.setattr(launch, "_C_LAUNCH", True)
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    made = []

    def expand(descriptor, layout):
        made.append(descriptor)
        return [("map", descriptor, layout), 8, 1]

    monkeypatch.setattr(driver, "make_tensordesc_arg", expand, raising=False)
    calls = []
    kernel = Kernel(Function(Compiled(c_launcher(calls, True))), {"BLOCK": 32})
    described = Described(lambda tensor: (tensor.data_ptr(),))
    tensors = [torch.ones(4) for _ in range(2)]
    for x in (tensors[0], *tensors, *tensors):
        kernel((1, 1, 1), 0, (x,), 4, described=described, of=(x,))
    addresses = [x.data_ptr() for x in tensors]
    assert made == addresses  # each once, though each was launched twice
    head = (1, 1, 1, 100, 17, False, True, None, None, "metadata", None, None, None)
    expected = [(*head, ("map", a, "layout"), 8, 1, a, 4, 32) for a in addresses]
    assert calls == expected * 2
    # What is kept does not grow without end.
    described.most = 2
    extra = torch.ones(4)
    kernel((1, 1, 1), 0, (extra,), 4, described=described, of=(extra,))
    assert list(described.known) == [(extra.data_ptr(),)]
    kernel((1, 1, 1), 0, (tensors[0],), 4, described=described, of=(tensors[0],))
    assert made == [*addresses, extra.data_ptr(), addresses[0]]


def test_the_c_function_without_descriptors(on_cpu, monkeypatch):
    monkeypatch.setattr(launch, "_C_LAUNCH", True)
    calls, x = [], torch.ones(4)
    kernel = Kernel(Function(Compiled(c_launcher(calls, False))), {"BLOCK": 32})
    for _ in range(2):
        kernel((1, 1, 1), 0, (x,), 4)
    head = (1, 1, 1, 100, 17, False, True, None, None, "metadata", None, None, None)
    assert calls == [(*head, x.data_ptr(), 4, 32)]


@pytest.mark.parametrize(
    "more", [{"global_scratch_size": 64}, {"profile_scratch_size": 64}, {"launch": lambda: None}]
)
def test_a_launcher_that_does_more_is_left_to_triton(on_cpu, monkeypatch, more):
    monkeypatch.setattr(launch, "_C_LAUNCH", True)
    calls, runs, x = [], [], torch.ones(4)

    class Launcher(SimpleNamespace):
        def __call__(self, *args) -> None:
            runs.append(args)

    launcher = Launcher(**vars(c_launcher(calls, False)) | more)
    kernel = Kernel(Function(Compiled(launcher)), {"BLOCK": 32})
    for _ in range(2):
        kernel((1, 1, 1), 0, (x,), 4)
    assert len(runs) == 1 and not calls


def test_versions_that_are_not_known_go_the_public_way(on_cpu, monkeypatch):
    monkeypatch.setattr(launch, "DIRECT_LAUNCH", False)
    compiled, x = Compiled(None), torch.ones(4)
    kernel = Kernel(Function(compiled), {"BLOCK": 32})
    for _ in range(2):
        kernel((1, 1, 1), 0, (x,), 4)
    assert compiled.launches == [((1, 1, 1), (x, 4, 32))]
