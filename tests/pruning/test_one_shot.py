"""One-shot pruning solves what it says it solves, for any model, and changes nothing if it fails."""

import copy

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F

from tests.pruning.one_shot_case import (
    EVERY,
    assert_same,
    correlated,
    encoder,
    kept_of,
    prune,
    reference,
    state,
)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("blocksize", [4, (2, 8), (5, 3)], ids=str)
@pytest.mark.parametrize("solve_dtype", [None, torch.float64], ids=["float32", "float64"])
def test_one_layer_is_what_the_formulas_say(bias, blocksize, solve_dtype):
    model = nn.Sequential(nn.Linear(24, 16, bias=bias))
    dense, x = copy.deepcopy(model), correlated(200, 24)
    report = prune(model, x.split(50), 0.6, blocksize, damping=0.03, solve_dtype=solve_dtype)
    size = blocksize if isinstance(blocksize, tuple) else (blocksize, blocksize)
    own = dense[0].bias.detach() if bias else None
    mask, weight, shift = reference(dense[0].weight.detach(), own, x, x, 0.6, size, 0.03)
    assert torch.equal(kept_of(model[0].weight, *size), mask)
    torch.testing.assert_close(model[0].weight.double(), weight, rtol=1e-3, atol=1e-4)
    if bias:
        torch.testing.assert_close(model[0].bias.double(), shift, rtol=1e-3, atol=1e-4)
    (entry,) = report.tensors
    assert (entry.kept, entry.grid) == (int(mask.sum()), tuple(mask.shape))
    with torch.no_grad():
        wanted = dense(x) - (dense(x).mean(0) if bias else 0)
        lost = (model(x) - dense(x)).square().sum() / wanted.square().sum()
    assert entry.error == pytest.approx(lost.item(), rel=1e-3)


def test_pruned_places_are_plain_zeros():
    model = nn.Sequential(nn.Linear(24, 16))
    weight = model[0].weight
    prune(model, [correlated(100, 24)])
    assert model[0].weight is weight
    zeros = weight.detach()[weight == 0]
    assert len(zeros) == weight.numel() // 2 and not zeros.signbit().any()


def test_the_second_layer_aims_at_the_dense_outputs_from_the_pruned_inputs():
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    dense, x = copy.deepcopy(model), correlated(300, 12)
    prune(model, x.split(100), damping=0.01, solve_dtype=torch.float64)
    with torch.no_grad():
        x_dense, x_pruned = dense[:2](x), model[:2](x)
    assert not torch.allclose(x_dense, x_pruned, atol=1e-2)
    last = dense[2]
    mask, weight, shift = reference(
        last.weight.detach(), last.bias.detach(), x_dense, x_pruned, 0.5, (4, 4), 0.01
    )
    assert torch.equal(kept_of(model[2].weight, 4, 4), mask)
    torch.testing.assert_close(model[2].weight.double(), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model[2].bias.double(), shift, rtol=1e-3, atol=1e-4)


def test_repair_beats_zeroing_the_same_blocks():
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    dense, (x, fresh) = copy.deepcopy(model), correlated(2, 500, 32)
    prune(model, [x], blocksize=8)
    zeroed = copy.deepcopy(dense)
    with torch.no_grad():
        for ours, other in zip(model.parameters(), zeroed.parameters(), strict=True):
            if ours.ndim == 2:
                other[ours == 0] = 0
        loss = [(m(fresh) - dense(fresh)).square().mean() for m in (model, zeroed)]
    assert loss[0] < 0.6 * loss[1]


def test_inputs_far_from_zero_lose_no_digits():
    model = nn.Sequential(nn.Linear(16, 8))
    dense, x = copy.deepcopy(model), torch.randn(400, 16) + 1000
    prune(model, x.split(100), damping=0.01)
    own = dense[0].bias.detach()
    mask, weight, _ = reference(dense[0].weight.detach(), own, x, x, 0.5, (4, 4), 0.01)
    assert torch.equal(kept_of(model[0].weight, 4, 4), mask)
    torch.testing.assert_close(model[0].weight.double(), weight, rtol=1e-3, atol=1e-3)


SINGULAR = {
    "fewer tokens than features": lambda: torch.randn(3, 16),
    "rank 1": lambda: torch.randn(50, 1).expand(50, 16),
    "zeros": lambda: torch.zeros(10, 16),
    "constant": lambda: torch.ones(10, 16),
    "dead features": lambda: F.pad(torch.randn(50, 8), (0, 8)),
}


@pytest.mark.parametrize("inputs", SINGULAR)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_singular_inputs_are_solved_with_what_they_do_not_determine_left_as_it_was(inputs, bias):
    x, damping = SINGULAR[inputs](), 1e-3
    model = nn.Sequential(nn.Linear(16, 8, bias=bias))
    old = model[0].weight.detach().double()
    report = prune(model, [x], damping=damping)
    new = model[0].weight.detach().double()
    assert new.isfinite().all() and report.sparsity == 0.5
    given = x.double() - (x.double().mean(0) if bias else 0)
    pull = damping * given.square().mean() or torch.tensor(damping)

    def objective(weight: Tensor) -> float:
        lost = ((weight - old) @ given.T).square().sum() / len(given)
        return (lost + pull * (weight - old).square().sum()).item()

    kept = new != 0
    assert objective(new) <= objective(old * kept) * (1 + 1e-4)
    unseen = (given.abs().amax(0) < 1e-6).expand_as(new) & kept
    torch.testing.assert_close(new[unseen], old[unseen], rtol=1e-4, atol=1e-5)


def test_a_level_of_zero_changes_next_to_nothing():
    model = nn.Sequential(nn.Linear(16, 8))
    dense = copy.deepcopy(model)
    prune(model, [correlated(100, 16)], 0.0)
    torch.testing.assert_close(model[0].weight, dense[0].weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).to(dtype)
    report = prune(model, [correlated(200, 16).to(dtype)])
    assert model[0].weight.dtype == dtype and report.sparsity == 0.5
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert max(entry.error for entry in report.tensors) < 0.9


def test_entries_have_levels_and_block_sizes_of_their_own():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    config = [
        {"tensor_fqn": "0.weight", "sparsity_level": 0.25},
        {"tensor_fqn": "2.weight", "blocksize": (2, 8)},
    ]
    before = model[1].weight.detach().clone()
    report = prune(model, [correlated(200, 16)], config=config)
    assert [(e.fqn, e.blocksize, e.sparsity) for e in report.tensors] == [
        ("0.weight", (4, 4), 0.25),
        ("2.weight", (2, 8), 0.5),
    ]
    assert torch.equal(model[1].weight, before)


def test_global_allocation_keeps_the_budget_and_moves_it_to_where_it_is_needed():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    x = correlated(200, 16)
    with torch.no_grad():
        model[1].weight[:, 4:] *= 1e-3  # three quarters of it are next to nothing
    report = prune(model, [x], 0.5, 4, allocation="global")
    first, second = report.tensors
    assert first.kept + second.kept == 16
    assert second.sparsity >= 0.75 > first.sparsity


def test_refining_brings_the_parts_closer_to_the_dense_ones():
    model, x = encoder(dropout=0.0), correlated(16, 6, 16)
    dense, plain = copy.deepcopy(model).eval(), copy.deepcopy(model)
    prune(plain, x.split(8), config=EVERY)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    report = prune(model, x.split(8), config=EVERY, refine_steps=60)
    assert [part.fqn for part in report.refined] == ["layers.0", "layers.1"]
    assert all(part.after < part.before for part in report.refined)
    assert [e.sparsity for e in report.tensors] == [0.5] * 8
    for entry in report.tensors:
        assert (model.get_parameter(entry.fqn) == 0).float().mean() == 0.5
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        loss = [(m.eval()(x) - dense(x)).square().mean() for m in (model, plain)]
    assert loss[0] < 0.9 * loss[1]


def test_the_report_is_a_table():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    report = prune(model, [torch.eye(16)], blocksize=(2, 4), config=[{"tensor_fqn": "*.weight"}])
    assert_expected_inline(
        str(report),
        """\
tensor    shape  block  grid  sparsity  error
--------  -----  -----  ----  --------  -----
0.weight   8x16    2x4   4x4     50.0%  0.000
1.weight    2x8    2x4   1x2     50.0%  0.000
2 tensors pruned: 50.0% of all blocks; error: share of the dense outputs that is lost
1 tensor skipped:
  2.weight 2x2: a 2x4 block is larger than its shape (2, 2)""",
    )


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_no_batch_reaches_is_named():
    model = Unused()
    before = state(model)
    with pytest.raises(ValueError, match="no batch reaches 'unused.weight'"):
        prune(model, [correlated(10, 8)])
    assert_same(model, before)


class Breaks(nn.Module):
    """Gives NaN, or fails, behind the first layer once that is pruned."""

    def __init__(self, what):
        super().__init__()
        self.first, self.last, self.what = nn.Linear(8, 8), nn.Linear(8, 8), what

    def forward(self, x):
        y = self.first(x)
        if self.what == "nan":
            y = y / 0 * 0
        # The pruned weights stand in for the dense ones, so that only outputs tell.
        elif not torch.allclose(y, x @ self.first.weight.T + self.first.bias, atol=1e-5):
            raise RuntimeError("pruned")
        return self.last(y)


@pytest.mark.parametrize(
    ("what", "error", "match"),
    [
        ("nan", ValueError, "inputs of 'last.weight' contain NaN or infinity in batch 0"),
        ("fail", RuntimeError, "pruned"),
    ],
)
def test_a_failure_on_the_way_leaves_the_model_as_it_was(what, error, match):
    model = Breaks(what)
    before = state(model)
    with pytest.raises(error, match=match):
        prune(model, [correlated(50, 8)])
    assert_same(model, before)
    assert model.training and "forward" not in model.last.__dict__
    assert F.linear is torch._C._nn.linear


def test_nan_weights_are_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="'1.weight' contains NaN"):
        prune(model, [correlated(10, 8)])


def test_a_convolution_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(8, 8, 1, 1\); only weights that"):
        prune(model, [torch.randn(9, 8, 1, 1)], config=[{"tensor_fqn": "0.weight"}])


def test_a_forward_that_differs_from_call_to_call_is_refused():
    class Alternating(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(8, 8), 0

        def forward(self, x):
            self.calls += 1
            return self.linear(x) if self.calls == 1 else x

    with pytest.raises(RuntimeError, match="differs from call to call"):
        prune(nn.ModuleList([Alternating()])[0], [correlated(10, 8)])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"level": 1.0}, ValueError, r"sparsity_level=1.0 is outside \[0, 1\)"),
        ({"blocksize": 0}, ValueError, "blocksize=0 must be at least 1"),
        ({"blocksize": 16}, ValueError, "nothing to prune"),
        ({"batches": []}, ValueError, "no calibration batch"),
        ({"batches": torch.randn(4, 8)}, TypeError, "put a single one in a list"),
        ({"batches": [3]}, TypeError, "a batch is a int"),
        ({"config": [{"tensor_fqn": "nope"}]}, ValueError, "no parameter is called 'nope'"),
        (
            {"config": [{"tensor_fqn": "0.weight", "scores_init": "weight_norm"}]},
            ValueError,
            "unknown key 'scores_init'",
        ),
        (
            {"config": [{"tensor_fqn": "0.weight", "mask": "weights"}]},
            ValueError,
            "has 'mask', which means nothing",
        ),
        ({"allocation": "best"}, ValueError, "allocation='best' is unknown"),
        ({"refine_steps": -1}, ValueError, "refine_steps=-1 must not be negative"),
        ({"refine_steps": 1.5}, TypeError, "refine_steps=1.5 must be an int"),
        ({"damping": 0.0}, ValueError, "damping=0.0 must be above 0"),
        ({"solve_dtype": torch.bfloat16}, ValueError, "must be torch.float32 or torch.float64"),
        ({"mask_fn": lambda batch: [1]}, TypeError, "mask_fn gives a list for batch 0"),
        ({"mask_fn": lambda batch: -batch}, ValueError, "values besides 0 and 1"),
        ({"mask_fn": lambda batch: torch.ones(3, 3)}, ValueError, "fits the inputs of no layer"),
        ({"mask_fn": lambda batch: torch.zeros(4)}, ValueError, "no token reaches '0.weight'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused_by_name(options, error, match):
    model = nn.Sequential(nn.Linear(8, 8))
    before = state(model)
    batches = options.pop("batches", [torch.randn(4, 8)])
    with pytest.raises(error, match=match):
        prune(model, batches, **options)
    assert_same(model, before)


def test_refining_a_part_that_takes_a_cache_is_refused():
    class Cache:
        def __init__(self):
            self.seen = []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x, cache):
            cache.seen.append(x)
            return self.down(self.up(x).relu())

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            cache = Cache()
            for layer in self.layers:
                x = layer(x, cache)
            return x

    model, x = Model(), correlated(20, 8)
    before = state(model)
    with pytest.raises(ValueError, match="use_cache=False"):
        prune(model, [x], refine_steps=3)
    assert_same(model, before)
    assert len(prune(model, [x]).tensors) == 4


@pytest.mark.gpu
def test_on_a_gpu_as_on_a_cpu():
    # In float64, so that no choice between blocks hangs on rounding.
    model, x = encoder(dropout=0.0).double(), correlated(8, 6, 16).double()
    other = copy.deepcopy(model).cuda()
    prune(model, [x], config=EVERY, solve_dtype=torch.float64)
    prune(other, [x.cuda()], config=EVERY, solve_dtype=torch.float64)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        # Not the zeros of a bias: a repaired one may be 0 here and 1e-18 there.
        if name.endswith("weight"):
            assert torch.equal(ours == 0, theirs.cpu() == 0), name
        torch.testing.assert_close(ours, theirs.cpu())
