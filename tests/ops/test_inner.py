"""What torch.compile's Inductor is given in place of the op, and who else must not see it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor.utils import run_and_get_code
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.common import DEVICES
from tests.reference import TOLERANCE, random_bsr, relative_error
from torchao_superblock import BSRLinear, to_bsr_linear
from torchao_superblock.ops import ACTIVATIONS, Operands, bsr_gated_linear, bsr_linear, build_plan
from torchao_superblock.ops.aot import FEW_TOKENS
from torchao_superblock.ops.gated import OPS as GATED
from torchao_superblock.ops.inner import OPS, PADDED_OPS

PUBLIC = "torch.ops.torchao_superblock.bsr_linear.default("
TRITON = "bsr_matmul_kernel"


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing that was compiled before, here or by another process, with other code of ours."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def layer(device: str = "cpu", dtype: torch.dtype = torch.float32, **changes) -> BSRLinear:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, device=device, dtype=dtype)
    with torch.no_grad():
        linear.weight[:32] = 0
        linear.weight[64:, 16:] = 0
    swapped = to_bsr_linear(linear, 16)
    for name, value in changes.items():
        setattr(swapped, name, value)
    return swapped


def code_of(function, *args) -> tuple[torch.Tensor, str]:
    y, code = run_and_get_code(function, *args)
    return y, "\n".join(code)


@pytest.mark.parametrize("activation", OPS)
def test_opcheck(activation):
    _, crow, col, values = random_bsr(48, 64, 16, 0.5)
    for bias in (None, torch.randn(48)):
        torch.library.opcheck(OPS[activation], (torch.randn(5, 64), crow, col, values, bias))
    for bias in (None, torch.randn(41)):
        arguments = (torch.randn(5, 60), crow, col, values, bias, 41)
        torch.library.opcheck(PADDED_OPS[activation], arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("lead", [(1,), (2, 3), ()])
def test_inductor_calls_it_and_the_numbers_stay(activation, lead):
    swapped, x = layer(activation=activation), torch.randn(*lead, 64)
    with torch.no_grad():
        y, code = code_of(torch.compile(swapped, fullgraph=True), x)
        assert f"bsr_product_{activation}.default(" in code and PUBLIC not in code
        assert torch.equal(y, swapped(x))
        assert y.shape == (*lead, 96) and y.is_contiguous()


def test_padded_blocks_have_an_op_of_their_own_and_nothing_around_it():
    _, crow, col, values = random_bsr(48, 64, 16, 0.5)

    def function(x, bias):
        return bsr_linear(x, crow, col, values, bias, 41, "gelu")

    x, bias = torch.randn(3, 60), torch.randn(41)
    y, code = code_of(torch.compile(function, fullgraph=True), x, bias)
    assert "bsr_padded_product_gelu.default(" in code and PUBLIC not in code
    # Neither x nor y is copied.
    assert "constant_pad_nd" not in code and "cpp_fused" not in code
    torch.testing.assert_close(y, function(x, bias))
    assert y.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_gradients_are_those_of_eager_mode(activation, device):
    swapped = layer(device, activation=activation)
    x = torch.randn(3, 64, device=device, requires_grad=True)
    wrt = (x, swapped.values, swapped.bias)
    compiled = torch.compile(swapped, fullgraph=True)
    y, code = code_of(compiled, x)
    assert PUBLIC not in code
    expected = swapped(x)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, wrt, upstream)
    for grad, reference in zip(grads, torch.autograd.grad(expected, wrt, upstream), strict=True):
        torch.testing.assert_close(grad, reference)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_casts_around_it(device):
    swapped, x = layer(device), torch.randn(2, 64, device=device)
    compiled = torch.compile(swapped, fullgraph=True)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        y, code = code_of(compiled, x)
        assert PUBLIC not in code
        assert y.dtype == torch.bfloat16
        assert relative_error(y, swapped(x)) <= TOLERANCE[torch.bfloat16]


def test_other_numbers_of_tokens_compile_as_often_as_a_dense_layer():
    counts = []
    for module in (layer(), nn.Linear(64, 96)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(module, fullgraph=True)
        with torch.no_grad():
            for M in (1, 2, 5, 64, 65, 300):
                x = torch.randn(M, 64)
                torch.testing.assert_close(compiled(x), module(x))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    ours, dense = counts
    assert ours == dense <= 3


def test_exported_programs_hold_the_public_op():
    swapped, x = layer().eval(), torch.randn(2, 64)
    with torch.no_grad():
        torch.compile(swapped)(x)  # leaves nothing behind
    for strict in (False, True):
        program = torch.export.export(swapped, (x,), strict=strict)
        for graph in (program, program.run_decompositions()):
            targets = {str(node.target) for node in graph.graph.nodes}
            assert "torchao_superblock.bsr_linear.default" in targets
            assert not any("bsr_product" in target for target in targets)


def test_other_compilers_see_the_public_op():
    seen = []

    def backend(graph, inputs):
        return torch._dynamo.backends.common.aot_autograd(
            fw_compiler=lambda graph, _: (
                seen.extend(map(str, (n.target for n in graph.graph.nodes))) or graph
            )
        )(graph, inputs)

    with torch.no_grad():
        torch.compile(layer(), backend=backend)(torch.randn(2, 64))
    assert "torchao_superblock.bsr_linear.default" in seen


@pytest.mark.parametrize("how", ["replaced", "written", "loaded", "called with others"])
def test_compiled_code_goes_by_the_index_that_is_there(how):
    swapped, x = layer(), torch.randn(2, 64)
    compiled = torch.compile(swapped, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        before = swapped.to_dense()
        # The blocks of the last block rows move by one column.
        col = swapped.col_indices.clone()
        col[-2:] = (col[-2:] + 1) % 4
        if how == "replaced":
            swapped.col_indices = col
        elif how == "written":
            swapped.col_indices.copy_(col)
        elif how == "loaded":
            swapped.load_state_dict({**swapped.state_dict(), "col_indices": col})
        else:
            replaced = {"col_indices": col}
            y = torch.compile(
                lambda x: torch.func.functional_call(swapped, replaced, (x,)), fullgraph=True
            )(x)
            swapped.col_indices = col
        if how != "called with others":
            y = compiled(x)
        dense = swapped.to_dense()
        assert not torch.equal(dense, before)
        torch.testing.assert_close(y, nn.functional.linear(x, dense, swapped.bias))


def test_copies_of_a_compiled_layer_compile_too():
    swapped, x = layer(), torch.randn(2, 64)
    with torch.no_grad():
        expected = torch.compile(swapped)(x)
        for copied in (copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped))):
            copied.values.mul_(2)
            copied.bias.mul_(2)
            torch.testing.assert_close(torch.compile(copied)(x), 2 * expected)
        torch.testing.assert_close(torch.compile(swapped)(x), expected)


@pytest.mark.parametrize("M", [2, FEW_TOKENS + 1])
def test_both_products_of_a_gated_mlp_are_seen_for_few_tokens(M):
    parts = [Operands(*random_bsr(64, 64, 16, 0.5)[1:]) for _ in range(2)]
    operands = (*parts[0][:4], *parts[1][:4])

    def function(x):
        return GATED["silu"](x, *operands)

    x = torch.randn(M, 64)
    with torch.no_grad():
        y, code = code_of(torch.compile(function, fullgraph=True), x)
        few = M <= FEW_TOKENS
        assert ("bsr_product_silu.default(" in code and "bsr_product_none.default(" in code) is few
        assert ("bsr_gated_linear_silu.default(" in code) is not few
        torch.testing.assert_close(y, function(x))


def graph_on_a_gpu(function, *inputs: tuple[tuple[int, ...], torch.dtype]) -> list[str]:
    """What Inductor is given of a function of CUDA tensors, traced without a GPU."""

    class Model(nn.Module):
        def forward(self, *tensors):
            return (function(*tensors),)

    with FakeTensorMode() as mode, torch.no_grad(), V.set_fake_mode(mode):
        tensors = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in inputs]
        graph, _ = aot_export_module(Model(), tensors, trace_joint=False)
    return [str(node.target) for node in graph.graph.nodes]


def test_a_gpu_is_given_kernels_for_few_tokens(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed here")
    from tests.ops.cuda.common import H200
    from torchao_superblock.ops.cuda.device import devices

    monkeypatch.setitem(devices, 0, H200._replace(name="a card without a file"))
    R, C = 64, 172
    nnz = R * C // 10
    index = [((R + 1,), torch.int32), ((nnz,), torch.int32), ((nnz, 64, 64), torch.bfloat16)]

    def product(x, crow, col, values):
        return bsr_linear(x, crow, col, values)

    launch, op = "triton_kernel_wrapper_functional", "torchao_superblock.bsr_linear.default"
    for lead, expected in (((1, 1), True), ((FEW_TOKENS,), True), ((FEW_TOKENS + 1,), False)):
        targets = graph_on_a_gpu(product, ((*lead, C * 64), torch.bfloat16), *index)
        assert (launch in targets, op in targets) == (expected, not expected)
        # Several programs share so long a block row.
        assert ("aten.sum.dim_IntList" in targets) is expected

    def gated(x, *index):
        return GATED["silu"](x, *index, None, *index, None)

    targets = graph_on_a_gpu(gated, ((1, C * 64), torch.bfloat16), *index)
    assert targets.count(launch) == 2 and "aten.mul.Tensor" in targets
    targets = graph_on_a_gpu(gated, ((FEW_TOKENS + 1, C * 64), torch.bfloat16), *index)
    assert "torchao_superblock.bsr_gated_linear_silu.default" in targets


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU compiled code launches the kernel itself.


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("M", [1, 7, FEW_TOKENS])
def test_compiled_code_launches_the_kernel(M, activation):
    swapped = layer("cuda", torch.bfloat16, activation=activation)
    x = torch.randn(M, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y, code = code_of(torch.compile(swapped, fullgraph=True), x)
        assert f"{TRITON}_0.run(" in code and "torch.ops.torchao_superblock" not in code
        assert "clone" not in code  # nothing is taken for written but y
        assert relative_error(y, swapped(x)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_sums_of_splits_are_left_to_the_compiler():
    """Few long block rows: programs share them."""
    _, crow, col, values = random_bsr(2048, 8192, 64, 0.9, torch.bfloat16, "cuda")
    plan = build_plan(crow, col, 128)
    x = torch.randn(1, 8192, device="cuda", dtype=torch.bfloat16)

    def function(x):
        return bsr_linear(x, crow, col, values, plan=plan) * 2

    y, code = code_of(torch.compile(function, fullgraph=True), x)
    assert f"{TRITON}_0.run(" in code and "sum_splits_kernel" not in code
    assert relative_error(y, function(x)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_many_or_unknown_tokens_keep_the_op():
    swapped = layer("cuda", torch.bfloat16)
    with torch.no_grad():
        for M, dynamic in ((FEW_TOKENS + 1, False), (8, True)):
            torch._dynamo.reset()
            x = torch.randn(M, 64, device="cuda", dtype=torch.bfloat16)
            y, code = code_of(torch.compile(swapped, dynamic=dynamic), x)
            assert PUBLIC in code
            assert relative_error(y, swapped(x)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_a_gated_mlp_is_two_launches_and_what_the_compiler_makes_of_the_rest():
    parts = []
    for _ in range(2):
        _, crow, col, values = random_bsr(128, 64, 16, 0.5, torch.bfloat16, "cuda")
        parts.append(Operands(crow, col, values))
    x = torch.randn(1, 1, 64, device="cuda", dtype=torch.bfloat16)

    def function(x):
        return bsr_gated_linear(x, *parts, "silu")

    with torch.no_grad():
        y, code = code_of(torch.compile(function, fullgraph=True), x)
        assert TRITON in code and "torch.ops.torchao_superblock" not in code
        assert relative_error(y, function(x)) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_reduce_overhead_replays_it():
    model = nn.Sequential(layer("cuda"), nn.ReLU(), nn.Linear(96, 64, device="cuda"))
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 64, device="cuda")
            assert relative_error(compiled(x).clone(), model(x)) <= 1e-5
