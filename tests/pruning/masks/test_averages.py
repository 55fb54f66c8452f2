"""Averages of models: masks come through right, or are refused by name; never another mask."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from tests.pruning.masks.kinds import KINDS
from torchao_superblock.ops import block_mask as arithmetic
from torchao_superblock.ops.block_mask import guards as mask_guards
from torchao_superblock.pruning import BlockMask, squash

GUARDS = ("checksums", "moments", "held_mean")


def make(kind: str, level: float = 0.75) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 20))
    sparsifier = KINDS[kind](level, 8)
    sparsifier.prepare(model, [{"tensor_fqn": "*"}])
    return model, sparsifier


def masks(model: nn.Module) -> list[BlockMask]:
    return [module for module in model.modules() if isinstance(module, BlockMask)]


def kept(model: nn.Module) -> list[int]:
    return [int(mask.block_mask().sum()) for mask in masks(model)]


def set_level(model: nn.Module, level: float) -> None:
    for mask in masks(model):
        mask.set_sparsity_level(level)


def average(decay: float, **kwargs: Any) -> Callable[[nn.Module], AveragedModel]:
    """Averages of every tensor, as torch and torchvision make them."""
    fn = kwargs or {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
    return lambda model: AveragedModel(model, use_buffers=True, **fn)


def torchvision_avg(old: Tensor, new: Tensor, _: object) -> Tensor:
    return 0.99998 * old + (1 - 0.99998) * new


AVERAGES = {
    "foreach": average(0.9999),
    "each": average(0.9999, avg_fn=get_ema_avg_fn(0.9999)),
    "torchvision": average(0.99998, avg_fn=torchvision_avg),
    "half": average(0.5),
}
X = torch.linspace(-1, 1, 3 * 32).view(3, 32)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("how", list(AVERAGES))
@pytest.mark.parametrize("frozen", [False, True])
def test_a_level_that_stays_is_averaged_right(kind: str, how: str, frozen: bool) -> None:
    model, sparsifier = make(kind)
    set_level(model, 1 / 32)
    if frozen:
        sparsifier.freeze()
    expected = kept(model)
    ema = AVERAGES[how](model)
    for _ in range(40):
        ema.update_parameters(model)
    # The integers are damaged, or the test would prove nothing.
    pairs = zip(masks(ema), masks(model), strict=True)
    assert any(int(a.n_kept) != int(b.n_kept) for a, b in pairs) == (how != "half")
    assert kept(ema) == expected == [31, 23]
    torch.testing.assert_close(ema(X), model(X))
    if frozen:
        assert [m.block_mask().tolist() for m in masks(ema)] == [
            m.block_mask().tolist() for m in masks(model)
        ]
    squash(ema)
    torch.testing.assert_close(ema(X), model(X))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("change", ["level", "freeze", "other held mask"])
def test_a_mixture_is_refused_by_name_and_masks_from_repairs_it(kind: str, change: str) -> None:
    model, sparsifier = make(kind)
    set_level(model, 0.1)
    if change == "other held mask":
        sparsifier.freeze()
    ema = AVERAGES["half"](model)
    ema.update_parameters(model)
    set_level(model, 0.9)
    if change == "other held mask":
        sparsifier.unfreeze()
    if change != "level":
        sparsifier.freeze()
    ema.update_parameters(model)
    before = copy.deepcopy(ema.state_dict())
    assert ema(X).isnan().all() and kept(ema) == [0, 0]
    torch._dynamo.reset()
    compiled = torch.compile(ema.module, backend="aot_eager", fullgraph=True)
    assert compiled(X).isnan().all()
    with pytest.raises(
        ValueError, match=r"(?s)squash: 'module\.0\.weight': an average has mixed.*masks_from="
    ):
        squash(ema)
    # What Lightning does at the end: the average becomes the model.
    live = copy.deepcopy(model)
    for average_, tensor in zip(ema.module.buffers(), live.buffers(), strict=True):
        tensor.data.copy_(average_.data)
    with pytest.raises(ValueError, match=r"squash: '0\.weight': an average"):
        squash(live)
    for key, tensor in ema.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)

    expected = [mask.block_mask() for mask in masks(model)]
    assert squash(ema, masks_from=model) is ema
    assert len(masks(model)) == 2 and not masks(ema)
    for i, mask in ((0, expected[0]), (2, expected[1])):
        weight = ema.module[i].weight.detach()
        full = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)[: weight.shape[0]]
        assert not weight[~full].any() and weight[full].all()
    assert not ema(X).isnan().any()


def test_summary_refuses_a_model_into_which_a_mixture_was_copied() -> None:
    model, sparsifier = make("supermask", 0.1)
    ema = AVERAGES["half"](model)
    ema.update_parameters(model)
    set_level(model, 0.9)
    ema.update_parameters(model)
    for average_, tensor in zip(ema.module.buffers(), model.buffers(), strict=True):
        tensor.data.copy_(average_.data)
    for refusing in (sparsifier.summary, sparsifier.squash_mask):
        with pytest.raises(ValueError, match=r"'0\.weight': an average has mixed"):
            refusing()
    sparsifier.step()  # writes the level anew
    assert sparsifier.summary().groups[0].kept == kept(model)[0] == 29
    sparsifier.squash_mask()


def test_an_average_that_forgets_comes_round() -> None:
    model, sparsifier = make("supermask", 0.1)
    ema = AVERAGES["half"](model)
    ema.update_parameters(model)
    set_level(model, 0.9)
    sparsifier.freeze()
    broken = []
    for _ in range(20):
        ema.update_parameters(model)
        broken.append([mask.is_broken for mask in masks(ema)])
        outputs = ema(X)
        assert outputs.isnan().all() == any(broken[-1])
        # What is not refused is right.
        for ours, theirs in zip(masks(ema), masks(model), strict=True):
            assert ours.is_broken or torch.equal(ours.block_mask(), theirs.block_mask())
    assert broken[0] == [True, True] and broken[-1] == [False, False]


def test_an_equal_weight_average_of_a_ramp_stays_refused() -> None:
    model, _ = make("supermask", 0.0)
    total = [copy.deepcopy(model)]
    for i in range(1, 20):
        set_level(model, i / 20)
        total.append(copy.deepcopy(model))
    mean = copy.deepcopy(model)
    for tensor, *others in zip(mean.buffers(), *(one.buffers() for one in total), strict=True):
        tensor.copy_(torch.stack([other.double() for other in others]).mean(0))
    assert all(mask.is_broken for mask in masks(mean))


def test_an_average_that_copies_integers_has_the_level_of_the_model() -> None:
    model, sparsifier = make("supermask", 0.1)
    ema = copy.deepcopy(model)
    set_level(model, 0.9)
    sparsifier.freeze()
    for average_, tensor in zip(
        ema.state_dict().values(), model.state_dict().values(), strict=True
    ):
        if average_.is_floating_point():
            average_.lerp_(tensor, 0.5)
        else:
            average_.copy_(tensor)
    assert kept(ema) == kept(model)
    squash(ema)


def test_a_broken_mask_stays_broken_whatever_is_called() -> None:
    model, _ = make("supermask", 0.1)
    mask = masks(model)[0]
    mask.moments.mul_(0.7)
    mask.n_kept.fill_(3)
    mask.freeze()
    assert mask.is_broken and model(X).isnan().all()
    mask.unfreeze()
    assert mask.is_broken
    mask.set_sparsity_level(0.5)
    assert not mask.is_broken and not model(X).isnan().any()


def test_buffers_written_by_hand_are_put_right() -> None:
    model, _ = make("supermask", 0.75)
    expected = model(X).detach()
    for name in ("n_kept", "frozen", "held_mask"):
        damaged = copy.deepcopy(model)
        for mask in masks(damaged):
            getattr(mask, name).fill_(1)
        torch.testing.assert_close(damaged(X), expected, rtol=0, atol=0)


def test_masks_from_has_to_fit() -> None:
    model, _ = make("supermask")
    other = nn.Sequential(nn.Linear(32, 64))
    with pytest.raises(ValueError, match=r"no mask on '0\.weight' and none at all"):
        squash(model, masks_from=other)
    KINDS["supermask"](0.75, 4).prepare(other, [{"tensor_fqn": "*"}])
    with pytest.raises(
        ValueError, match=r"'0\.weight' has shape \(64, 32\) in blocks of \(8, 8\).*\(4, 4\)"
    ):
        squash(model, masks_from=other)
    assert len(masks(model)) == 2


# -------------------------------------------------------------------------------------------------
# Checkpoints
# -------------------------------------------------------------------------------------------------


def without_guards(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith(GUARDS)}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("way", ["copy", "assign", "meta"])
def test_a_checkpoint_of_an_earlier_version_loads(kind: str, frozen: bool, way: str) -> None:
    model, sparsifier = make(kind, 0.5)
    if frozen:
        sparsifier.freeze()
    old = without_guards(model.state_dict())
    assert len(old) == len(model.state_dict()) - 2 * len(GUARDS)
    if way == "meta":
        with torch.device("meta"):
            other, _ = make(kind)
    else:
        other, _ = make(kind)
    assert not other.load_state_dict(old, assign=way != "copy").missing_keys
    assert torch.equal(other(X), model(X))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="moments"):  # damaged is not old
        other.load_state_dict({k: v for k, v in model.state_dict().items() if "moments" not in k})


def test_a_pickle_of_an_earlier_version_loads() -> None:
    model, sparsifier = make("supermask", 0.5)
    sparsifier.freeze()
    old = copy.deepcopy(model)
    for mask in masks(old):
        for name in GUARDS:
            delattr(mask, name)
    restored = pickle.loads(pickle.dumps(old))
    assert torch.equal(restored(X), model(X))
    torch.testing.assert_close(restored.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_mixture_is_refused_at_loading_before_anything_is_touched() -> None:
    model, sparsifier = make("supermask", 0.1)
    ema = AVERAGES["half"](model)
    ema.update_parameters(model)
    set_level(model, 0.9)
    sparsifier.freeze()
    ema.update_parameters(model)
    other, _ = make("supermask", 0.3)
    before = copy.deepcopy(other.state_dict())
    with torch.no_grad():
        ema.module[0].bias.add_(1)
    with pytest.raises(RuntimeError, match=r"the checkpoint's mask of '0\.weight' means nothing"):
        other.load_state_dict(ema.module.state_dict())
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)
    mask = masks(other)[0]
    with pytest.raises(RuntimeError, match="means nothing"):
        mask.load_state_dict(masks(ema)[0].state_dict())
    # A run that goes on takes its average up where it was.
    resumed = AVERAGES["half"](other)
    resumed.load_state_dict(ema.state_dict())
    torch.testing.assert_close(resumed.state_dict(), ema.state_dict(), rtol=0, atol=0)
    for _ in range(8):
        resumed.update_parameters(model)
    assert kept(resumed) == kept(model)


def test_a_repairable_average_is_put_right_at_loading() -> None:
    model, sparsifier = make("supermask", 1 / 32)
    sparsifier.freeze()
    ema = AVERAGES["foreach"](model)
    for _ in range(3):
        ema.update_parameters(model)
    for mask in masks(ema):
        mask.frozen.zero_()
    assert int(masks(ema)[0].n_kept) < 31
    other, _ = make("supermask", 0.5)
    other.load_state_dict(ema.module.state_dict())
    assert all(mask.is_frozen for mask in masks(other))
    assert [int(mask.n_kept) for mask in masks(other)] == [31, 23]
    torch.testing.assert_close(other(X), model(X))


# -------------------------------------------------------------------------------------------------
# The arithmetic
# -------------------------------------------------------------------------------------------------


def test_checksums_are_the_same_numbers_in_python_and_torch_and_all_different() -> None:
    values = [*range(1, 3000), 2**24, 2**31 - 1]
    tensors = mask_guards.level_checksum(torch.tensor(values))
    assert tensors.tolist() == [mask_guards.level_checksum(value) for value in values]
    assert len(set(tensors.tolist())) == len(values) and min(tensors.tolist()) > 0
    torch.manual_seed(0)
    seen = set()
    for _ in range(300):
        held = (torch.rand(9, 7) < 0.5).to(torch.int8)
        total = mask_guards.held_sum(held)
        checksum = mask_guards.pattern_checksum(torch.tensor(1), total)
        assert int(checksum) == mask_guards.pattern_checksum(1, int(total))
        seen.add(int(checksum))
    assert len(seen) == 300 and mask_guards.NOTHING_HELD not in seen


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.9999])
def test_no_average_of_two_levels_is_taken_for_one_of_them_by_its_checksum(decay: float) -> None:
    n = torch.arange(1, 500)
    for other in (1, 2, 57, 499):
        a, b = mask_guards.level_checksum(n), mask_guards.level_checksum(torch.tensor(other))
        mixed = ((n * decay + other * (1 - decay)).long(), (a * decay + b * (1 - decay)).long())
        right = mask_guards.level_checksum(mixed[0]) == mixed[1]
        assert not right.any()


# -------------------------------------------------------------------------------------------------
# Lightning
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [False, True])
def test_lightnings_ema(change: bool, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this version of lightning has no EMAWeightAveraging")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.sparsifier = make("supermask", 0.1 if change else 1 / 32)
            self.twin: nn.Module | None = None

        def training_step(self, batch: list[Tensor]) -> Tensor:
            if change and self.global_step == 2:
                set_level(self.model, 0.9)
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.sparsifier.param_groups(self.model), lr=1e-3)

        def on_train_end(self) -> None:
            # Callbacks come first: the model is the average by now.
            self.twin = copy.deepcopy(self.model)

    module = Module()
    expected = kept(module.model)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(64, 32)), batch_size=4
    )
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callbacks.EMAWeightAveraging(decay=0.9999)],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert module.twin is not None
    if change:
        assert module.twin(X).isnan().all()
        with pytest.raises(ValueError, match=r"'0\.weight': an average has mixed"):
            squash(module.twin)
        module.sparsifier.step()
        assert not module.model(X).isnan().any()
    else:
        assert int(masks(module.twin)[0].n_kept) < expected[0] == 31
        assert kept(module.twin) == expected
        squash(module.twin)
        assert not module.twin(X).isnan().any()


# -------------------------------------------------------------------------------------------------
# CUDA
# -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("blocksize", [8, (1, 8)])  # compared in pairs, and sorted
@pytest.mark.parametrize("frozen", [False, True])
def test_cuda_repairs_and_refuses_without_launches_of_its_own(blocksize: Any, frozen: bool) -> None:
    linear = nn.Linear(512, 512, device="cuda")
    sparsifier = KINDS["supermask"](0.1, blocksize)
    sparsifier.prepare(linear, [{"tensor_fqn": "weight"}])
    mask = masks(linear)[0]
    if frozen:
        sparsifier.freeze()
    guards, state = mask.guards, (mask.n_kept, mask.held_mask, mask.frozen)

    def launches(*more: Any) -> int:
        arithmetic.block_mask(mask.full_scores(), *state, *more)  # compiles
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            arithmetic.block_mask(mask.full_scores(), *state, *more)
            torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages() if event.device_time_total > 0)

    assert launches(guards) == launches()
    out = linear.weight.detach().clone()
    for buffer in (*state, *guards):
        buffer.copy_(buffer * 0.9999 + buffer * 0.0001)
    assert torch.equal(linear.weight, out)
    mask.n_kept.zero_()
    mask.checksums.zero_()
    mask.moments[1 if not frozen else 2].add_(0.3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        weight = linear.weight
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weight.isnan().all()
