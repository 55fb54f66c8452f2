"""transformers (5.24): masks under its `Trainer`, stopped, resumed and squashed."""

import shutil

import pytest
import torch
from torch import nn

from torchao_superblock import BSRLinear, RigLSparsifier, SupermaskSparsifier, swap_to_bsr

transformers = pytest.importorskip("transformers", reason="needs the `transformers` extra")
pytest.importorskip("accelerate", reason="needs the `transformers` extra")

from transformers import Trainer, TrainingArguments  # noqa: E402

from tests.integrations.transformer_models import build, sparse, targets  # noqa: E402
from torchao_superblock.integrations.transformers import (  # noqa: E402
    SparseTrainerMixin,
    SparsifierCallback,
)


class SparseTrainer(SparseTrainerMixin, Trainer):
    pass


TOKENS = torch.randint(1, 96, (12, 6), generator=torch.Generator().manual_seed(2))
DATA = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]
KINDS = {
    "scores": lambda: SupermaskSparsifier(0.6, 16),
    "ramp": lambda: SupermaskSparsifier(0.6, 16, ramp_steps=3, freeze_step=5),
    "gradients": lambda: RigLSparsifier(0.6, 16, update_every=2, freeze_step=5),
}


def arguments(folder, **more: object) -> TrainingArguments:
    given = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 3,
    }
    return TrainingArguments(str(folder), **{**given, **more})


def prepared(kind: str = "scores") -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    model = build("llama", attention_dropout=0.1)
    sparsifier = KINDS[kind]()
    sparsifier.prepare(model, targets("llama"))
    return model, sparsifier


def trainer_of(model, sparsifier, folder, squash=False, resume_from=None, **more):
    callback = SparsifierCallback(sparsifier, squash=squash, resume_from=resume_from)
    arguments_ = arguments(folder, **more)
    return SparseTrainer(
        model, arguments_, train_dataset=DATA, eval_dataset=DATA, callbacks=[callback]
    )


@pytest.fixture(scope="module", params=KINDS)
def straight(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    model, sparsifier = prepared(request.param)
    trainer_of(model, sparsifier, folder).train()
    return request.param, model, sparsifier, folder


def assert_same(sparsifier, other) -> None:
    ours, theirs = sparsifier.state_dict(), other.state_dict()
    assert ours["step"] == theirs["step"] == 6
    assert ours["groups"] == theirs["groups"]
    assert all(
        torch.equal(entry["mask"], theirs["state"][fqn]["mask"])
        for fqn, entry in ours["state"].items()
    )


def test_a_resumed_training_equals_a_straight_one(straight, tmp_path):
    kind, model, sparsifier, folder = straight
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    resumed, other = prepared(kind)
    with torch.no_grad():  # all of it comes from the checkpoint
        for parameter in resumed.parameters():
            parameter.add_(1)
    trainer_of(resumed, other, tmp_path).train(resume_from_checkpoint=True)
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in resumed.state_dict().items())
    assert_same(sparsifier, other)


@pytest.mark.parametrize("straight", ["ramp"], indirect=True)
def test_a_checkpoint_elsewhere(straight, tmp_path):
    kind, _, sparsifier, folder = straight
    checkpoint = folder / "checkpoint-3"
    resumed, other = prepared(kind)
    trainer = trainer_of(resumed, other, tmp_path, resume_from=checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_same(sparsifier, other)
    resumed, other = prepared(kind)
    with pytest.raises(FileNotFoundError, match="goes on from step 3.*sparsifier.pt.*resume_from"):
        trainer_of(resumed, other, tmp_path / "x").train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("straight", ["ramp"], indirect=True)
def test_the_sparsifier_of_another_run_is_refused(straight, tmp_path):
    kind, _, _, folder = straight
    for wrong, rule in (("step", "is of step 4"), ("mask", "another mask for 'model.layers")):
        checkpoint = tmp_path / wrong / "checkpoint-3"
        shutil.copytree(folder / "checkpoint-3", checkpoint)
        content = torch.load(checkpoint / "sparsifier.pt", weights_only=True)
        if wrong == "step":
            content["global_step"] = 4
        else:
            for entry in content["sparsifier"]["state"].values():
                entry["mask"].logical_not_()
        torch.save(content, checkpoint / "sparsifier.pt")
        model, sparsifier = prepared(kind)
        with pytest.raises(ValueError, match=rule):
            trainer_of(model, sparsifier, checkpoint.parent).train(resume_from_checkpoint=True)
        assert sparsifier.state_dict()["step"] == 0


def test_scores_are_not_decayed():
    model, sparsifier = prepared()
    trainer = trainer_of(model, sparsifier, "unused")
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert decay.keys() == set(names.values())
    scores = {name for name in decay if name.endswith(".scores")}
    assert len(scores) == 14 and all(decay[name] == 0.0 for name in scores)
    assert decay["model.layers.0.mlp.up_proj.parametrizations.weight.original"] == 0.1


def test_wrong_optimizers_are_refused(tmp_path):
    model, sparsifier = prepared()
    callbacks = [SparsifierCallback(sparsifier)]
    with pytest.raises(
        RuntimeError, match="decays the scores of 'model.layers.*by 0.1.*SparseTrainer"
    ):
        Trainer(model, arguments(tmp_path), train_dataset=DATA, callbacks=callbacks).train()
    model, sparsifier = build("llama"), KINDS["scores"]()
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier.prepare(model, targets("llama"))
    trainer = SparseTrainer(
        model,
        arguments(tmp_path),
        train_dataset=DATA,
        callbacks=[SparsifierCallback(sparsifier)],
        optimizers=(optimizer, None),
    )
    with pytest.raises(
        RuntimeError, match="does not train the scores of 'model.layers.*before prepare"
    ):
        trainer.train()


def test_a_model_that_is_not_prepared_is_refused(tmp_path):
    _, sparsifier = prepared()
    for other in (sparsifier, KINDS["scores"]()):
        with pytest.raises(RuntimeError, match="has not prepared the model of this Trainer"):
            trainer_of(build("llama"), other, tmp_path).train()
    with pytest.raises(TypeError, match="expected a sparsifier, got Linear"):
        SparsifierCallback(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_scores_are_refused(kind, tmp_path):
    model, sparsifier = prepared(kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith((".scores", ".carrier")))
    with pytest.raises(RuntimeError, match="scores of 'model.layers.*do not require gradients"):
        trainer_of(model, sparsifier, tmp_path).train()


def test_squashed_at_the_end_swapped_and_trained_on(tmp_path):
    model, sparsifier = prepared()
    trainer = trainer_of(model, sparsifier, tmp_path, squash=True, max_steps=2, save_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "dense")  # an ordinary one now
    dense = type(model).from_pretrained(tmp_path / "dense")
    up = dense.model.layers[0].mlp.up_proj.weight
    assert torch.equal(up, model.model.layers[0].mlp.up_proj.weight)
    report = swap_to_bsr(model, 16, min_sparsity=0.2)
    assert len(report.swapped) == 14

    # The stored blocks under a Trainer, straight and resumed.
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    Trainer(
        model, arguments(tmp_path / "tune", max_steps=4, save_steps=2), train_dataset=DATA
    ).train()
    other = type(model).from_pretrained(tmp_path / "dense", attention_dropout=0.1)
    swap_to_bsr(other, 16, min_sparsity=0.2)
    assert all(torch.equal(start[key], tensor) for key, tensor in other.state_dict().items())
    shutil.rmtree(tmp_path / "tune" / "checkpoint-4")
    again = Trainer(
        other, arguments(tmp_path / "tune", max_steps=4, save_steps=2), train_dataset=DATA
    )
    again.train(resume_from_checkpoint=True)
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in other.state_dict().items())
    loaded = type(model).from_pretrained(tmp_path / "tune" / "checkpoint-4")
    assert isinstance(loaded.model.layers[0].mlp.up_proj, BSRLinear)


def test_the_best_model_is_squashed(tmp_path):
    model, sparsifier = prepared()
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    trainer = trainer_of(model, sparsifier, tmp_path, squash=True, **options)
    trainer.train()
    best, other = prepared()
    from safetensors.torch import load_file

    best.load_state_dict(load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors"))
    other.squash_mask()
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in best.state_dict().items())


def test_a_loaded_model_trains_under_a_trainer(tmp_path):
    sparse().save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = model.model.layers[0].mlp.up_proj.values.clone()
    Trainer(model, arguments(tmp_path, max_steps=1, save_strategy="no"), train_dataset=DATA).train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.values, before)


def test_an_unsquashed_model_is_saved_in_checkpoints_only(tmp_path):
    model, sparsifier = prepared()
    trainer = trainer_of(model, sparsifier, tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    with pytest.raises(RuntimeError, match="not squashed yet"):
        trainer.save_model(tmp_path / "final")


def test_a_skipped_step_does_not_count():
    model, sparsifier = prepared()
    callback = SparsifierCallback(sparsifier)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for skipped, steps in ((True, 0), (False, 1)):
        optimizer.step_was_skipped = skipped
        callback.on_optimizer_step(None, None, None, optimizer=optimizer)
        assert sparsifier.state_dict()["step"] == steps


def test_a_search_that_saves_elsewhere_is_said(tmp_path):
    _, sparsifier = prepared()
    callback = SparsifierCallback(sparsifier)
    state = transformers.TrainerState(global_step=3)
    with pytest.raises(FileNotFoundError, match="checkpoint-3' to save the sparsifier in"):
        callback.on_save(arguments(tmp_path), state, None)
