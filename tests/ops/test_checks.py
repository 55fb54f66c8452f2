"""What the op and its gradients refuse, with the value and the rule in the message."""

import pytest
import torch

from tests.reference import random_bsr
from torchao_superblock.ops import bsr_linear


class TestErrors:
    @pytest.fixture
    def operands(self):
        _, crow, col, values = random_bsr(32, 48, 16, 0.5)
        return {"x": torch.randn(4, 48), "crow_indices": crow, "col_indices": col, "values": values}

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"x": torch.randn(4, 48).double()}, TypeError, "one dtype.*float64.*float32"),
            ({"x": torch.randn(4, 48).long()}, TypeError, "int64"),
            ({"x": torch.tensor(1.0)}, ValueError, "0-dim"),
            ({"bias": torch.randn(31)}, ValueError, r"\(32,\).*\(31,\)"),
            ({"bias": torch.randn(32).half()}, TypeError, "bias torch.float16"),
            ({"values": torch.randn(3, 16)}, ValueError, "nnz, block_rows, block_cols"),
            (
                {"values": torch.randn(0, 0, 16)},
                ValueError,
                r"blocks of at least 1x1, got \(0, 0, 16\)",
            ),
            ({"values": torch.randn(5, 16, 16)}, ValueError, "col_indices must have shape"),
            ({"crow_indices": torch.tensor([0, 1, 3])}, TypeError, "int32.*int64"),
            ({"crow_indices": torch.zeros(0).int()}, ValueError, "crow_indices"),
            ({"out_features": 16}, ValueError, r"out_features=16.*\[17, 32\]"),
            ({"out_features": 33}, ValueError, "out_features=33"),
            (
                {"x": torch.randn(4, 96), "in_features": 48},
                ValueError,
                r"in_features=48.*\(4, 96\)",
            ),
            ({"in_features": 32}, ValueError, r"in_features=32.*\(4, 48\)"),
            ({"activation": "tanh"}, ValueError, "unknown activation 'tanh'.*'gelu'"),
            ({"plan": torch.zeros(3).int()}, ValueError, "plan must be int32.*build_plan"),
            ({"values": torch.randn(3, 16, 16, device="meta")}, RuntimeError, "one device.*meta"),
        ],
    )
    def test_bad_arguments_name_the_value_and_the_rule(self, operands, change, error, words):
        with pytest.raises(error, match=words):
            bsr_linear(**(operands | change))

    def test_errors_are_the_same_when_compiling(self, operands):
        with pytest.raises(Exception, match="one dtype"):
            torch.compile(bsr_linear, backend="eager")(
                **(operands | {"x": torch.randn(4, 48).double()})
            )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.tensor(1.0)}, ValueError, "grad must have shape"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have shape"),
        ({"values": torch.zeros(2, 4, 0)}, ValueError, "at least 1x1"),
        ({"values": torch.zeros(2, 4)}, ValueError, "values must have shape|at least 1x1"),
        ({"values": torch.zeros(2, 4, 4).to(torch.complex64)}, TypeError, "got torch.complex64"),
        ({"crow": torch.tensor(0).int()}, ValueError, "crow_indices must have shape"),
        ({"col": torch.tensor(0).int()}, ValueError, "col_indices must have shape"),
        ({"in_features": -8}, ValueError, "must not be negative"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_gradient_ops_refuse_what_the_forward_refuses(change, error, message):
    arguments = {
        "grad": torch.randn(3, 8),
        "x": torch.randn(3, 8),
        "crow": torch.tensor([0, 1, 2]).int(),
        "col": torch.tensor([0, 1]).int(),
        "values": torch.randn(2, 4, 4),
        "in_features": 8,
        **change,
    }
    grad, x, crow, col, values, in_features = arguments.values()
    ops = torch.ops.torchao_superblock
    if "x" not in change:
        with pytest.raises(error, match=message):
            ops.bsr_linear_grad_x(grad, crow, col, values, in_features)
    if "in_features" not in change:
        rows, cols = (*values.shape[1:], 0)[:2]
        x = x.to(values.dtype)
        with pytest.raises(error, match=message):
            ops.bsr_linear_grad_values(grad, x, crow, col, rows, cols)
