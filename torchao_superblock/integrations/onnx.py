"""ONNX: swapped models leave with their blocks.

ONNX has no block-sparse operator, so a layer becomes standard ones, as `ops/pytorch.py` computes it: block rows
with the same number n of stored blocks share one batched product, and nothing is padded.

    gather     the columns of x that those rows read       (M, C, c)        -> (B, M, n * c)
    multiply   with their blocks side by side              x (B, n * c, r)  -> (B, M, r)
    put back   the rows of all groups into their order                      -> (M, R, r)

The sums of a row are made within the product. Adding up single products with `ScatterND(reduction="add")` would be
simpler and is not used: with several threads onnxruntime's CPU kernel loses updates where indices repeat.

Legend: M tokens, N out features, K in features, R x C the block grid, r x c the block size, nnz stored blocks, B block
rows with n stored blocks each.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

__all__ = ["export"]

_FLOAT, _FLOAT16, _BFLOAT16 = 1, 10, 16  # of onnx.TensorProto


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> "torch.onnx.ONNXProgram":
    """Export a swapped model to ONNX; its block-sparse layers become gathers and batched products of their blocks.

    The file needs nothing of this package: opset 18 or later, standard operators only. Activations that layers apply
    themselves are exported with them. float16 and bfloat16 are summed in float32. Which dtypes a runtime has operators
    for is its own matter: onnxruntime's CPU kernels have no bfloat16 and no `gelu` in float64.

    Args:
        model: in inference mode (`model.eval()`); a model without a :class:`BSRLinear` will do.
        args: example inputs.
        path: where to write the file, or None.
        kwargs: example inputs by name.
        dynamic_shapes: as of `torch.onnx.export`, for example `({0: "batch"},)`.
        options: further keyword arguments of `torch.onnx.export`, for example `input_names` or `opset_version`.
            An own `custom_translation_table` is added to what is needed here.

    Returns:
        What `torch.onnx.export` returns; call it to run it in onnxruntime.

    Raises:
        ImportError: onnx or onnxscript is not installed (`pip install 'torchao_superblock[onnx]'`).
        ValueError: `model` is in training mode, or `options` say `dynamo=False`, which cannot export the op.
        torch.onnx.OnnxExporterError: torch cannot export the model, or indices of a layer are no constants of it.

    Example:
        >>> from torchao_superblock.integrations import onnx
        >>> program = onnx.export(model.eval(), (x,), "m.onnx", dynamic_shapes=({0: "batch"},))  # doctest: +SKIP
        >>> y = onnxruntime.InferenceSession("m.onnx").run(None, {"input": x.numpy()})  # doctest: +SKIP
    """
    _check_installed()
    if model.training:
        raise ValueError(
            "onnx.export: the model is in training mode; call model.eval() first, since a file has no other mode"
        )
    if not options.pop("dynamo", True):
        raise ValueError(
            "onnx.export: dynamo=False (TorchScript) cannot export the op; leave it out"
        )
    more = options.pop("custom_translation_table", None) or {}
    shared = {"kwargs": kwargs, "dynamo": True, "dynamic_shapes": dynamic_shapes}
    op = torch.ops.torchao_superblock.bsr_linear.default
    with torch.no_grad():  # with gradients, layers leave their activation to be run behind them
        # What a translation sees are symbols. The pattern decides on the graph here, so torch.onnx captures the
        # program first, in its own ways, and translates it once its constants are known.
        captured = torch.onnx.export(
            model,
            args,
            optimize=False,
            verbose=options.get("verbose"),
            custom_translation_table={**more, op: _stand_in},
            **shared,
        ).exported_program
        constants = _constants(captured)

        def translate(*inputs: Any, **attributes: Any) -> Any:
            return _bsr_linear(constants, *inputs, **attributes)

        table = {op: translate, **more}
        return torch.onnx.export(
            captured, args, path, custom_translation_table=table, **shared, **options
        )


def _stand_in(x: Any, *_: Any, **__: Any) -> Any:
    from onnxscript import opset18 as op

    return op.Identity(x)


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"onnx.export: it needs onnx and onnxscript ({error}): pip install 'torchao_superblock[onnx]'"
        ) from error


def _constants(program: ExportedProgram) -> dict[str, Tensor]:
    """Parameters, buffers and constants by the names that they have in the graph."""
    held = program.state_dict | program.constants
    return {
        spec.arg.name: held[spec.target]
        for spec in program.graph_signature.input_specs
        if spec.target in held
    }


def _bsr_linear(
    constants: dict[str, Tensor],
    x: Any,
    crow_indices: Any,
    col_indices: Any,
    values: Any,
    bias: Any = None,
    out_features: int | None = None,
    activation: str = "none",
    plan: Any = None,
) -> Any:
    """The op in standard operators; its arguments are symbolic values, with shapes as far as they are static."""
    from onnxscript import opset18 as op

    crow, col = constants.get(crow_indices.name), constants.get(col_indices.name)
    if crow is None or col is None:
        raise ValueError(
            "bsr_linear: its indices are not constants of the model (buffers), and ONNX needs to know them at export"
        )
    _, r, c = (int(size) for size in values.shape)
    R, K = crow.shape[0] - 1, x.shape[-1]
    if not isinstance(K, int):
        raise ValueError(f"bsr_linear: the last dimension of x must be static for ONNX, got {K}")
    C, N = -(-K // c), R * r if out_features is None else int(out_features)
    dtype = int(values.dtype)
    work = _FLOAT if dtype in (_FLOAT16, _BFLOAT16) else dtype  # what sums are in, as in the op

    def ints(*numbers: int) -> Any:
        return op.Constant(value_ints=numbers)

    lead = op.Slice(op.Shape(x), ints(0), ints(-1))
    if C * c != K:  # a ragged edge: zeros up to whole blocks
        x = op.Pad(x, ints(0, C * c - K), None, ints(-1))
    if work != dtype:
        x, values = op.Cast(x, to=work), op.Cast(values, to=work)
    x = op.Reshape(x, ints(-1, C, c))

    counts = crow.diff()
    parts, order = [], []
    for n in counts.unique().tolist():
        rows = (counts == n).nonzero().flatten()
        B = len(rows)
        if n == 0:  # one row of zeros stands for all of them
            tokens = op.Slice(op.Shape(x), ints(0), ints(1))
            zero = op.Cast(op.Constant(value_float=0.0), to=work)
            parts.append(op.Expand(zero, op.Concat(tokens, ints(1, r), axis=0)))
            order.append((rows, torch.zeros_like(rows)))
            continue
        blocks = (crow[rows].long()[:, None] + torch.arange(n, device=crow.device)).flatten()
        read = op.Gather(x, ints(*col[blocks].tolist()), axis=1)
        read = op.Transpose(op.Reshape(read, ints(-1, B, n * c)), perm=(1, 0, 2))
        # Of constants alone: runtimes compute it once, when they load the file.
        weight = op.Reshape(op.Gather(values, ints(*blocks.tolist()), axis=0), ints(B, n, r, c))
        weight = op.Reshape(op.Transpose(weight, perm=(0, 1, 3, 2)), ints(B, n * c, r))
        parts.append(op.Transpose(op.MatMul(read, weight), perm=(1, 0, 2)))
        order.append((rows, torch.arange(B, device=rows.device)))
    y = parts[0] if len(parts) == 1 else op.Concat(*parts, axis=1)
    place, start = torch.empty(R, dtype=torch.int64, device="cpu"), 0
    for rows, within in order:
        place[rows.cpu()] = start + within.cpu()
        start += int(within[-1]) + 1
    if start != R or not torch.equal(place, torch.arange(R, device="cpu")):
        y = op.Gather(y, ints(*place.tolist()), axis=1)

    y = op.Reshape(y, ints(-1, R * r))
    if N != R * r:
        y = op.Slice(y, ints(0), ints(N), ints(1))
    if bias is not None:
        y = op.Add(y, op.Cast(bias, to=work) if work != dtype else bias)
    y = _activate(op, activation, y, work)
    if work != dtype:
        y = op.Cast(y, to=dtype)
    return op.Reshape(y, op.Concat(lead, ints(N), axis=0))


def _activate(op: Any, name: str, y: Any, dtype: int) -> Any:
    """The activations of the op, from operators that every runtime has; see `ops/activations.py`."""

    def number(value: float) -> Any:
        return op.Cast(op.Constant(value_float=value), to=dtype)

    if name == "none":
        return y
    if name == "relu":
        return op.Relu(y)
    if name == "silu":
        return op.Mul(y, op.Sigmoid(y))
    if name == "quick_gelu":
        return op.Mul(y, op.Sigmoid(op.Mul(number(1.702), y)))
    if name == "gelu":  # y / 2 * (1 + erf(y / sqrt(2)))
        inner = op.Erf(op.Div(y, number(math.sqrt(2))))
    elif name == "gelu_tanh":  # y / 2 * (1 + tanh(sqrt(2 / pi) * (y + 0.044715 * y ** 3)))
        cube = op.Mul(number(0.044715), op.Mul(y, op.Mul(y, y)))
        inner = op.Tanh(op.Mul(number(math.sqrt(2 / math.pi)), op.Add(y, cube)))
    else:
        raise ValueError(f"bsr_linear: the activation {name!r} has no ONNX form")
    return op.Mul(op.Mul(number(0.5), y), op.Add(inner, number(1.0)))
