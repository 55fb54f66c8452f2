"""Levels for each layer keep a budget of blocks, or a promised speedup as a timer sees it."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchao_superblock import SupermaskSparsifier, allocate, prune_one_shot
from torchao_superblock.pruning import Sensitivity
from torchao_superblock.pruning.one_shot import LayerSensitivity

LEVELS = (0.5, 0.75, 0.9375)


def small_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def table(**changes: tuple[float, ...]) -> Sensitivity:
    shapes = {"0.weight": (128, 64), "2.weight": (64, 128)}
    layers = [
        LayerSensitivity(fqn, shape, (16, 16), 32, changes[f"layer{fqn[0]}"])
        for fqn, shape in shapes.items()
    ]
    return Sensitivity(1.0, LEVELS, layers)


# The second layer bears pruning ten times better.
UNEVEN = table(layer0=(1.0, 2.0, 4.0), layer2=(0.1, 0.2, 0.4))


class Work(TorchDispatchMode):
    """Counts weights that are multiplied with: the time of a machine on which they alone count."""

    def __init__(self, overhead: float = 0.0):
        super().__init__()
        self.total, self.overhead = 0.0, overhead

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "torchao_superblock":
            self.total += args[3].numel() + self.overhead
        elif func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.total += args[-1].numel()
        elif func is torch.ops.aten.linear.default:
            self.total += args[1].numel()
        return func(*args, **(kwargs or {}))


def by_work(overhead: float = 0.0):
    def timer(call) -> float:
        with Work(overhead) as work:
            call()
        return work.total

    return timer


def levels(config) -> dict[str, float]:
    return {entry["tensor_fqn"]: entry["sparsity_level"] for entry in config}


def test_blocks_go_where_they_cost_least():
    config = allocate(UNEVEN, sparsity_level=0.5)
    assert levels(config) == {"2.weight": 0.9375, "0.weight": 2 / 32}
    assert config.speedup is None and config.loss == pytest.approx(0.4 + 1.0 * 2 / 16)


def test_the_config_is_one_for_both_ways_to_prune():
    config = allocate(UNEVEN, sparsity_level=0.6)
    model = small_model()
    report = prune_one_shot(model, [torch.randn(50, 64)], 0.5, 32, config, progress=False)
    assert {entry.fqn: entry.sparsity for entry in report.tensors} == levels(config)
    assert report.sparsity == pytest.approx(0.6, abs=0.5 / 64)
    prepared = small_model()
    sparsifier = SupermaskSparsifier()
    sparsifier.prepare(prepared, config)
    assert {group.fqn: group.sparsity for group in sparsifier.summary().groups} == levels(config)


@pytest.mark.parametrize("speedup", [1.3, 1.5, 2.0, 5.0])
def test_a_promised_speedup_holds_on_the_whole_model(speedup):
    model, x = small_model(), torch.randn(4, 64)
    config = allocate(UNEVEN, model=model, example_input=x, speedup=speedup, timer=by_work())
    kept = sum(8192 * (1 - level) for level in levels(config).values())
    kept += 8192 * (2 - len(config)) + 640
    assert (2 * 8192 + 640) / kept == pytest.approx(config.speedup)
    assert speedup * 0.95 <= config.speedup <= speedup * 1.05
    # What bears pruning better is pruned first.
    assert levels(config)["2.weight"] >= levels(config).get("0.weight", 0.0)
    assert type(model[0]) is nn.Linear and (model[0].weight != 0).all()


def test_layers_slower_in_the_model_than_alone_are_made_up_for():
    def timer(call) -> float:
        with Work() as work:
            result = call()
        # The whole model, and no layer alone, takes a quarter more once it is sparse.
        whole = result.shape[-1] == 10
        return work.total * (1.25 if whole and work.total < 2 * 8192 + 640 else 1.0)

    model, x = small_model(), torch.randn(4, 64)
    config = allocate(UNEVEN, model=model, example_input=x, speedup=1.5, timer=timer)
    assert 1.5 * 0.95 <= config.speedup <= 1.5 * 1.05
    plain = allocate(UNEVEN, model=model, example_input=x, speedup=1.5, timer=by_work())
    assert config.loss > plain.loss


def test_a_default_device_does_not_get_in_the_way():
    model, x = small_model(), torch.randn(4, 64)
    call = dict(model=model, example_input=x, speedup=1.5, timer=by_work())
    expected = allocate(UNEVEN, **call)
    with torch.device("meta"):
        assert levels(allocate(UNEVEN, **call)) == levels(expected)


def test_a_speedup_out_of_reach_says_what_can_be_had():
    model, x = small_model(), torch.randn(4, 64)
    with pytest.raises(
        ValueError, match=r"speedup of 40.00 cannot be had.* is 10.23, at 0.weight 94%"
    ):
        allocate(UNEVEN, model=model, example_input=x, speedup=40, timer=by_work())


def test_layers_that_the_swap_leaves_dense_bring_no_time():
    ragged = LayerSensitivity("4.weight", (10, 64), (16, 16), 4, (0.0, 0.0, 0.0))
    cheap = Sensitivity(1.0, LEVELS, [*UNEVEN.layers, ragged])
    model, x = small_model(), torch.randn(4, 64)
    config = allocate(cheap, model=model, example_input=x, speedup=1.3, timer=by_work())
    assert list(levels(config)) == ["2.weight"]  # though the other one would cost nothing


def test_the_timer_of_torch_is_used_by_default():
    model, x = small_model(), torch.randn(4, 64)
    try:
        config = allocate(UNEVEN, model=model, example_input=x, speedup=1.01)
    except ValueError as error:  # on a busy machine anything may be slower
        assert "the best that was measured on the whole model is" in str(error)
    else:
        assert config.speedup >= 0.95


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, "give either sparsity_level"),
        ({"sparsity_level": 0.5, "speedup": 2.0}, ValueError, "give either sparsity_level"),
        ({"speedup": 2.0}, ValueError, "speedup needs model and example_input"),
        ({"sparsity_level": 1.0}, ValueError, r"outside \[0, 1\)"),
        ({"sparsity_level": 0.0}, ValueError, "prunes no block at all"),
        (
            {"sparsity_level": 0.97},
            ValueError,
            r"needs 62 of 64 blocks pruned.*up to 0.9375 only, 60 blocks \(93.8%\)",
        ),
        (
            {"speedup": 0.9, "model": nn.Linear(2, 2), "example_input": 1},
            ValueError,
            "speedup=0.9 must be above 1",
        ),
        (
            {"speedup": "2", "model": nn.Linear(2, 2), "example_input": 1},
            TypeError,
            "speedup='2' must be a number above 1",
        ),
        (
            {"speedup": 2.0, "model": nn.Sequential(nn.Identity()), "example_input": torch.ones(2)},
            ValueError,
            "the model has no parameter '0.weight'",
        ),
    ],
)
def test_bad_budgets_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        allocate(UNEVEN, **options)


def test_a_sensitivity_without_layers_is_refused():
    with pytest.raises(ValueError, match="has no layers"):
        allocate(Sensitivity(1.0, LEVELS, []), sparsity_level=0.5)
