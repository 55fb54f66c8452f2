"""Swapped models in onnxruntime: the same numbers, at any batch, from a file that holds blocks."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.bsr.common import prune_all
from tests.reference import TOLERANCE, random_bsr, relative_error
from torchao_superblock import BSRLinear, swap_to_bsr
from torchao_superblock.integrations import onnx as onnx_export
from torchao_superblock.ops import ACTIVATIONS, bsr_linear

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def run(path, *inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    fed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, fed)[0])


class Op(nn.Module):
    """The op as it is, for shapes and patterns that no layer has."""

    def __init__(self, crow, col, values, bias=None, out_features=None, activation="none"):
        super().__init__()
        for name, tensor in (("crow", crow), ("col", col), ("values", values), ("bias", bias)):
            self.register_buffer(name, tensor)
        self.out_features, self.activation = out_features, activation

    def forward(self, x):
        args = (self.crow, self.col, self.values, self.bias, self.out_features, self.activation)
        return bsr_linear(x, *args)


def exported(model: nn.Module, x: torch.Tensor, path, batch: int = 1) -> torch.Tensor:
    """What onnxruntime makes of x, from a model exported with another batch."""
    example = torch.randn(batch, *x.shape[1:], dtype=x.dtype)
    shapes = ({0: "batch"},)
    onnx_export.export(model.eval(), (example,), path, dynamic_shapes=shapes, verbose=False)
    return run(path, x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, tmp_path):
    _, *parts = random_bsr(48, 64, 16)
    model = Op(*parts, torch.randn(48), activation=activation)
    x = torch.randn(7, 64)
    y = exported(model, x, tmp_path / "m.onnx")
    assert relative_error(y, model.double()(x.double())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("lead", [(5,), (5, 3), (1,), (0, 3)])
def test_dtypes_and_leading_dimensions(dtype, lead, tmp_path):
    dense, *parts = random_bsr(48, 64, (16, 8), dtype=dtype)
    x = torch.randn(*lead, 64, dtype=dtype)
    y = exported(Op(*parts, torch.ones(48, dtype=dtype), activation="relu"), x, tmp_path / "m.onnx")
    reference = torch.relu(x.double() @ dense.double().T + 1)
    assert y.shape == (*lead, 48) and y.dtype == dtype
    assert relative_error(y, reference) < TOLERANCE[dtype]


@pytest.mark.parametrize(("N", "K"), [(45, 64), (48, 61), (33, 49)])
def test_shapes_that_are_no_multiple_of_the_block_size(N, K, tmp_path):
    dense, *parts = random_bsr(48, 64, 16)
    x = torch.randn(6, K)
    y = exported(Op(*parts, torch.ones(N), out_features=N), x, tmp_path / "m.onnx")
    assert relative_error(y, x.double() @ dense[:N, :K].double().T + 1) < 1e-6


@pytest.mark.parametrize("kept", ["none", "one row", "one block", "all"])
def test_patterns(kept, tmp_path):
    mask = torch.zeros(3, 4, dtype=torch.bool)
    if kept == "one row":
        mask[1] = True
    elif kept == "one block":
        mask[2, 3] = True
    elif kept == "all":
        mask[:] = True
    dense, *parts = random_bsr(48, 64, 16, mask=mask)
    x = torch.randn(6, 64)
    y = exported(Op(*parts), x, tmp_path / "m.onnx")
    assert relative_error(y, x.double() @ dense.double().T) < 1e-6


def test_a_swapped_model_leaves_with_its_blocks(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    prune_all(model.eval(), 64, 0.9)
    reference = model.double()
    x = torch.randn(9, 256)
    expected = reference(x.double())
    model.float()
    dense = tmp_path / "dense.onnx"
    onnx_export.export(model, (x,), dense, verbose=False, external_data=False)
    report = swap_to_bsr(model, 64, min_sparsity=0.5, fuse_activations=True)
    assert len(report.swapped) == 2 and model[0].activation == "gelu"
    path = tmp_path / "m.onnx"
    shapes = ({0: "batch"},)
    onnx_export.export(
        model, (x[:2],), path, dynamic_shapes=shapes, verbose=False, external_data=False
    )
    assert relative_error(run(path, x), expected) < 1e-6
    assert path.stat().st_size < 0.2 * dense.stat().st_size

    import onnx

    graph = onnx.load(path).graph
    assert {"Gather", "MatMul"} <= {node.op_type for node in graph.node}
    assert all(node.domain == "" for node in graph.node)  # nothing of ours is needed to run it


def test_a_transformer_with_a_swapped_attention(tmp_path):
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, activation="gelu")
    model = prune_all(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), 16)
    x = torch.randn(5, 6, 64)
    swap_to_bsr(model, 16, min_sparsity=0)
    assert isinstance(model.layers[0].self_attn.out_proj, BSRLinear)
    y = exported(model, x, tmp_path / "m.onnx", batch=2)  # torch makes a batch of one static
    assert relative_error(y, model(x)) < 1e-5


def test_an_own_translation_table_is_added(tmp_path):
    from onnxscript import opset18

    called = []

    def relu(x):
        called.append(x)
        return opset18.Relu(x)

    model = nn.Sequential(Op(*random_bsr(48, 64, 16)[1:]), nn.ReLU()).eval()
    table = {torch.ops.aten.relu.default: relu}
    program = onnx_export.export(
        model, (torch.randn(2, 64),), custom_translation_table=table, verbose=False
    )
    assert called and "Gather" in {node.op_type for node in program.model.graph}


def test_several_threads_give_the_same_numbers(tmp_path):
    """Many blocks a row, and threads that share them: each run is right, not only most."""
    dense, *parts = random_bsr(128, 2048, 16, sparsity=0.5)
    x = torch.randn(64, 2048)
    exported(Op(*parts), x, tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 8
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", options)
    name = session.get_inputs()[0].name
    runs = [torch.from_numpy(session.run(None, {name: x.numpy()})[0]) for _ in range(20)]
    assert relative_error(runs[0], x.double() @ dense.double().T) < 1e-6
    assert all(relative_error(run, runs[0]) < 1e-6 for run in runs)


def test_indices_that_are_inputs_are_refused():
    class Given(nn.Module):
        def forward(self, x, crow, col, values):
            return bsr_linear(x, crow, col, values)

    _, *parts = random_bsr(48, 64, 16)
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        onnx_export.export(Given().eval(), (torch.randn(2, 64), *parts), verbose=False)
    assert "its indices are not constants of the model" in str(caught.value)


def test_arguments_are_checked():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="call model.eval"):
        onnx_export.export(model.train(), (torch.ones(1, 4),))
    with pytest.raises(ValueError, match="dynamo=False"):
        onnx_export.export(model.eval(), (torch.ones(1, 4),), dynamo=False)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_what_is_missing_is_said(missing):
    script = f"""
import sys
sys.modules[{missing!r}] = None
import torch
from torchao_superblock.integrations import onnx
try:
    onnx.export(torch.nn.Identity().eval())
except ImportError as error:
    assert "pip install 'torchao_superblock[onnx]'" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
