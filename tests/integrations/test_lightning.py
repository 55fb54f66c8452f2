"""A fit with masks in Lightning: steps, checkpoints, resume, tests of a checkpoint, averages."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning", reason="needs Lightning (the `lightning` extra)")

import lightning.pytorch as pl

from torchao_superblock import MagnitudeSparsifier, SupermaskSparsifier, swap_to_bsr
from torchao_superblock.bsr import BSRLinear
from torchao_superblock.integrations.lightning import BlockSparsity

CONFIG = [{"tensor_fqn": "model.0.weight"}, {"tensor_fqn": "model.2.weight"}]


class Module(pl.LightningModule):
    def __init__(self, sparsity=None):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.sparsity = [sparsity]  # in a list: no part of the module
        self.losses = []
        self.tested = []

    def configure_optimizers(self):
        groups = self.parameters()
        if self.sparsity[0] is not None:
            groups = self.sparsity[0].sparsifier.param_groups(self, weight_decay=0.05)
        return torch.optim.AdamW(groups, lr=1e-2)

    def loss(self, batch):
        (x,) = batch
        return (self.model(x) - x.roll(1, 1)).square().mean()

    def training_step(self, batch, _):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, _):
        self.log("val", self.loss(batch))

    def test_step(self, batch, _):
        self.tested.append(self.loss(batch).item())


def data():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=8)


def sparsity(cls=SupermaskSparsifier, **options):
    return BlockSparsity(
        cls(0.75, 8, ramp_steps=6, freeze_step=10), copy.deepcopy(CONFIG), **options
    )


def trainer(folder, *callbacks, **options):
    warnings.filterwarnings("ignore", module="lightning")
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
        **{"enable_checkpointing": False, **options},
    )  # fmt: skip


def zero_blocks(weight):
    return weight.detach().view(weight.shape[0] // 8, 8, -1, 8).eq(0).all(3).all(1)


def test_a_fit_ends_squashed_and_swaps(tmp_path):
    callback = sparsity()
    module = Module(callback)
    trainer(tmp_path, callback, max_epochs=2).fit(module, data())
    assert type(module.model[0]) is nn.Linear
    for layer in (module.model[0], module.model[2]):
        assert zero_blocks(layer.weight).sum() == 24
    swap_to_bsr(module, min_sparsity=0.5)
    assert isinstance(module.model[0], BSRLinear)


def test_steps_are_those_of_the_optimizer(tmp_path):
    callback = sparsity(squash=False)
    module = Module(callback)
    trainer(tmp_path, callback, max_epochs=1, accumulate_grad_batches=2).fit(module, data())
    assert len(module.losses) == 8
    assert callback.sparsifier.state_dict()["step"] == 4


def test_a_step_that_a_scaler_skips_does_not_count(tmp_path):
    class Scaler:
        scales = iter([8.0, 8.0, 4.0, 4.0, 2.0, 2.0, 4.0, 4.0, 4.0])  # at the start, and after each

        def get_scale(self):
            return next(self.scales)

    class Scaled(pl.plugins.Precision):
        scaler = Scaler()

    callback = sparsity(squash=False)
    module = Module(callback)
    trainer(tmp_path, callback, max_epochs=1, plugins=[Scaled()]).fit(module, data())
    assert callback.sparsifier.state_dict()["step"] == 6  # of 8: it fell twice


def test_resume_is_the_straight_run(tmp_path):
    straight = sparsity()
    module = Module(straight)
    trainer(tmp_path / "a", straight, max_epochs=4).fit(module, data())

    first = sparsity(squash=False)
    half = Module(first)
    run = trainer(tmp_path / "b", first, max_epochs=2)
    run.fit(half, data())
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = sparsity()
    resumed = Module(second)
    trainer(tmp_path / "c", second, max_epochs=4).fit(
        resumed, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=False
    )
    assert half.losses + resumed.losses == module.losses
    for ours, theirs in zip(resumed.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_testing_a_checkpoint_gets_its_masks_back(tmp_path):
    callback = sparsity()
    module = Module(callback)
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val", save_weights_only=False)
    run = trainer(tmp_path, callback, checkpoints, max_epochs=3, enable_checkpointing=True)
    run.fit(module, data(), data())
    assert type(module.model[0]) is nn.Linear
    run.test(module, data(), ckpt_path="best", weights_only=False)
    state = torch.load(checkpoints.best_model_path, weights_only=False)["state_dict"]
    expected = Module()
    sparsifier = SupermaskSparsifier(0.75, 8, ramp_steps=6, freeze_step=10)
    sparsifier.prepare(expected, copy.deepcopy(CONFIG))
    expected.load_state_dict(state)
    with torch.no_grad():
        losses = [expected.loss(batch).item() for batch in data()]
    assert module.tested == losses
    # And squashed again: with the checkpoint's weights.
    assert type(module.model[0]) is nn.Linear and zero_blocks(module.model[0].weight).any()
    module.tested.clear()
    run.test(module, data())  # no checkpoint: the module as it is
    assert type(module.model[0]) is nn.Linear
    assert module.tested == pytest.approx(losses)


@pytest.mark.skipif(
    not hasattr(pl.callbacks, "WeightAveraging"), reason="this Lightning has no WeightAveraging"
)
@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_average_is_squashed_under_the_trained_masks(use_buffers, tmp_path):
    class Average(pl.callbacks.WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return step_idx is not None and step_idx >= 10

    callback = sparsity(MagnitudeSparsifier)
    module = Module(callback)
    masks = []

    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            masks.extend(
                layer.parametrizations.weight[0].block_mask()
                for layer in (pl_module.model[0], pl_module.model[2])
            )

    average = Average(use_buffers=use_buffers)
    run = trainer(tmp_path, callback, Look(), average, max_epochs=3)
    run.fit(module, data(), data())
    for layer, mask in zip((module.model[0], module.model[2]), masks, strict=True):
        assert torch.equal(zero_blocks(layer.weight), ~mask)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_average_of_a_swapped_module_keeps_its_indices(use_buffers, tmp_path):
    average_class = getattr(pl.callbacks, "WeightAveraging", None)
    if average_class is None:
        pytest.skip("this Lightning has no WeightAveraging")
    callback = sparsity()
    module = Module(callback)
    trainer(tmp_path, callback, max_epochs=2).fit(module, data())
    swap_to_bsr(module, min_sparsity=0.5)
    module.sparsity[0] = None
    before = module.model[0].col_indices.clone()
    run = trainer(tmp_path, average_class(use_buffers=use_buffers), max_epochs=1)
    run.fit(module, data(), data())
    assert torch.equal(module.model[0].col_indices, before)
    assert module.loss(next(iter(data()))).isfinite()


@pytest.mark.skipif(
    not hasattr(pl.callbacks, "WeightAveraging"), reason="this Lightning has no WeightAveraging"
)
def test_the_wrong_order_of_callbacks_is_refused(tmp_path):
    callback = sparsity()
    module = Module(callback)
    run = trainer(tmp_path, pl.callbacks.WeightAveraging(), callback, max_epochs=1)
    with pytest.raises(ValueError, match="put BlockSparsity first"):
        run.fit(module, data())
    assert type(module.model[0]) is nn.Linear


def test_bad_input():
    with pytest.raises(TypeError, match="sparsifier must be one of torchao_superblock's, got int"):
        BlockSparsity(3)


def test_masks_of_another_sparsifier_are_refused(tmp_path):
    callback = sparsity()
    module = Module(callback)
    MagnitudeSparsifier(0.5, 8).prepare(module, copy.deepcopy(CONFIG))
    with pytest.raises(RuntimeError, match="masks of another sparsifier"):
        trainer(tmp_path, callback, max_epochs=1).fit(module, data())
