"""An optimizer that goes on with the stored blocks of a swapped model."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import swa_utils
from torch.optim.lr_scheduler import CosineAnnealingLR

from tests.injection import each_interruption
from torchao_superblock import MagnitudeSparsifier, squash, swap_to_bsr
from torchao_superblock.bsr import BSRLinear

NAMES = ["0.weight", "2.weight"]


def masks() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(shape, generator=generator) < 0.5 for shape in ((8, 4), (4, 8))]


def masked_model(zero_block: bool = False) -> nn.Sequential:
    """Two layers with given masks; the first block of each that is kept may be zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    kept = masks()
    if zero_block:
        for layer, mask in zip((model[0], model[2]), kept, strict=True):
            row, col = mask.nonzero()[0].tolist()
            with torch.no_grad():
                layer.weight[8 * row : 8 * row + 8, 8 * col : 8 * col + 8] = 0
    sparsifier = MagnitudeSparsifier(0.5, 8)
    sparsifier.prepare(
        model,
        [
            {"tensor_fqn": name, "mask": mask}
            for name, mask in zip(("0.weight", "2.weight"), kept, strict=True)
        ],
    )
    return model


def batches(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 32, generator=generator) for _ in range(n)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = (model(x) - x.roll(1, 1)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def twins(make, zero_block: bool = False, before: int = 5):
    """The same model twice after some steps: still masked, and squashed; each with its optimizer."""
    result = []
    for _ in range(2):
        model = masked_model(zero_block)
        optimizer = make(model.parameters())
        for x in batches(before):
            step(model, optimizer, x)
        result.append((model, optimizer))
    squash(result[1][0])
    return result


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd, momentum, foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "adam, foreach": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_curve_is_that_of_the_masked_model(name):
    (masked, first), (swapped, second) = twins(OPTIMIZERS[name], zero_block=True)
    report = swap_to_bsr(swapped, min_sparsity=0.1, optimizer=second)
    assert [entry.fqn for entry in report.swapped] == ["0", "2"]
    assert f"the optimizer ({type(second).__name__}) goes on" in report.notes[-1]
    ours, theirs, start = [], [], swapped[0].values.detach().clone()
    for x in batches(20):
        theirs.append(step(masked, first, x))
        ours.append(step(swapped, second, x))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)
    assert not torch.allclose(swapped[0].values, start, rtol=1e-4)


GAINED = {
    "adamw": (1, lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, eps=1e-14)),
    "adamax": (1, lambda p: torch.optim.Adamax(p, lr=1e-3, eps=1e-14)),
    "rmsprop": (1, lambda p: torch.optim.RMSprop(p, 1e-4, momentum=0.9, centered=True, eps=1e-14)),
    "sgd": (2, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
    "adagrad": (1, lambda p: torch.optim.Adagrad(p, lr=1e-3, eps=1e-14)),
    "adadelta": (0, lambda p: torch.optim.Adadelta(p, eps=1e-14)),
    "asgd": (2, lambda p: torch.optim.ASGD(p, lr=1e-2, lambd=0.0)),
    "rprop": (0, lambda p: torch.optim.Rprop(p, lr=1e-4)),
}


@pytest.mark.parametrize("name", GAINED)
def test_a_gain_is_taken_into_account(name):
    power, make = GAINED[name]
    curves = []
    for swap in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).double()
        sparsifier = MagnitudeSparsifier(0.8, 8, ramp_steps=3, freeze_step=3)
        sparsifier.prepare(model)
        weights = [layer.parametrizations.weight.original for layer in (model[0], model[2])]
        groups = [{"params": weights}, {"params": [model[0].bias, model[2].bias]}]
        optimizer = make(groups)
        xs = [x.double() for x in batches(20)]
        for x in xs[:6]:
            step(model, optimizer, x)
            sparsifier.step()
        if swap:
            gain = sparsifier.summary().groups[0].gain
            assert gain == 2.0
            sparsifier.squash_mask()
            report = swap_to_bsr(model, optimizer=optimizer, min_sparsity=0.5)
            assert "2 of them were multiplied by a gain of 2" in report.notes[-1]
            optimizer.param_groups[0]["lr"] *= gain**power
            if "weight_decay" in optimizer.param_groups[0]:
                optimizer.param_groups[0]["weight_decay"] /= gain**power
            if name == "asgd":  # its learning rate is part of its state
                for weight in optimizer.param_groups[0]["params"]:
                    optimizer.state[weight]["eta"] *= gain**power
        curves.append(torch.tensor([step(model, optimizer, x) for x in xs]))
    torch.testing.assert_close(*curves, rtol=1e-5, atol=0)


def test_a_kept_block_that_is_zero_is_stored_and_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight.zero_()
    mask = torch.eye(4, dtype=torch.bool)
    sparsifier = MagnitudeSparsifier(0.75, 8)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight", "mask": mask}])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    squash(model)
    report = swap_to_bsr(model, min_sparsity=0.5, optimizer=optimizer)
    (entry,) = report.swapped
    assert entry.blocksize == (8, 8) and entry.sparsity == 0.75
    assert model[0].nnz == 4 and not model[0].values.any()
    step(model, optimizer, batches(1)[0])
    assert model[0].values.ne(0).all()


@pytest.mark.parametrize("blocksize", [4, 16])
def test_kept_blocks_are_stored_in_blocks_of_another_size(blocksize):
    model = masked_model(zero_block=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = [
        mask.repeat_interleave(8, 0).repeat_interleave(8, 1).view(n, blocksize, -1, blocksize)
        for mask, n in zip(masks(), (64 // blocksize, 32 // blocksize), strict=True)
    ]
    squash(model)
    swap_to_bsr(model, blocksize, min_sparsity=0.0, optimizer=optimizer)
    for layer, elements in zip((model[0], model[2]), expected, strict=True):
        assert layer.nnz == elements.any(3).any(1).sum()


def test_without_an_optimizer_zeros_are_what_counts():
    model = masked_model(zero_block=True)
    squash(model)
    swap_to_bsr(model, min_sparsity=0.1)
    assert [layer.nnz for layer in (model[0], model[2])] == [int(m.sum()) - 1 for m in masks()]


def test_schedulers_groups_names_and_the_scaler_go_on():
    model = masked_model()
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": named[:2], "lr": 1e-2}, {"params": named[2:], "weight_decay": 0.0}], lr=1e-3
    )
    scheduler = CosineAnnealingLR(optimizer, 20)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    step(model, optimizer, batches(1)[0])
    scheduler.step()
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    squash(model)
    model(batches(1)[0]).square().mean().backward()
    biases = model[0].bias, model[2].bias
    swap_to_bsr(model, min_sparsity=0.1, optimizer=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == sizes
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in (model[0].values, model[2].values, *biases)} <= {id(p) for p in held}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in held}
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert {"0.values", "2.values"} <= set(names)
    assert model[0].values.grad is None and model[0].bias.grad is not None
    for x in batches(3):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def test_a_state_dict_of_the_optimizer_loads_into_one_of_the_swapped_model():
    # Where the weights took part in the same order as they do after the swap.
    model = masked_model()
    squash(model)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    step(model, optimizer, batches(1)[0])
    swap_to_bsr(model, min_sparsity=0.1, optimizer=optimizer)
    other = copy.deepcopy(model)
    again = OPTIMIZERS["adam"](other.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x in batches(3):
        assert step(model, optimizer, x) == step(other, again, x)


def portrait(model, optimizer):
    return (
        [(name, id(p), p.clone()) for name, p in model.named_parameters()],
        [list(map(id, group["params"])) for group in optimizer.param_groups],
        {id(p): dict(state) for p, state in optimizer.state.items()},
    )


def assert_same(before, after):
    for (name, address, tensor), (other, theirs, now) in zip(before[0], after[0], strict=True):
        assert (name, address) == (other, theirs) and torch.equal(tensor, now)
    assert before[1:] == after[1:]


class OwnStep(torch.optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


class NoStepOfItsOwn(torch.optim.Adam):
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS cannot go on"),
        (lambda p: torch.optim.Adafactor(p), "Adafactor cannot go on"),
        (lambda p: OwnStep(p), "OwnStep cannot go on"),
        (lambda p: "adam", "must be a torch.optim.Optimizer, got str"),
    ],
)
def test_an_optimizer_whose_steps_mix_elements_or_are_unknown_is_refused(make, words):
    model = masked_model()
    optimizer = make(list(model.parameters()))
    squash(model)
    weight = model[0].weight
    with pytest.raises(TypeError, match=words):
        swap_to_bsr(model, min_sparsity=0.1, optimizer=optimizer)
    assert model[0].weight is weight


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_refused():
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    with pytest.raises(TypeError, match="Muon cannot go on"):
        swap_to_bsr(model, optimizer=torch.optim.Muon(model.parameters()))


def test_a_subclass_that_steps_as_its_base_is_accepted():
    _, (model, optimizer) = twins(NoStepOfItsOwn)
    assert swap_to_bsr(model, min_sparsity=0.1, optimizer=optimizer).swapped


def test_the_optimizer_of_another_model_is_refused_and_nothing_changes():
    _, (model, optimizer) = twins(OPTIMIZERS["adam"])
    stranger = torch.optim.Adam(copy.deepcopy(model).parameters())
    before = portrait(model, optimizer)
    with pytest.raises(ValueError, match=r"does not hold '0.weight'.*not of a copy"):
        swap_to_bsr(model, min_sparsity=0.1, optimizer=stranger)
    assert_same(before, portrait(model, optimizer))


def test_state_of_another_shape_is_refused_and_nothing_changes():
    _, (model, optimizer) = twins(OPTIMIZERS["adam"])
    optimizer.state[model[2].weight]["row_norms"] = torch.ones(32)
    before = portrait(model, optimizer)
    with pytest.raises(ValueError, match=r"'row_norms' of '2.weight' has shape \(32,\)"):
        swap_to_bsr(model, min_sparsity=0.1, optimizer=optimizer)
    assert_same(before, portrait(model, optimizer))


def test_dropped_features_are_refused():
    _, (model, optimizer) = twins(OPTIMIZERS["adam"])
    with pytest.raises(ValueError, match="drop_dead_features drops weights that the optimizer"):
        swap_to_bsr(model, optimizer=optimizer, drop_dead_features=True)


def test_a_frozen_weight_may_be_missing():
    model = masked_model()
    squash(model)
    model[2].weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    report = swap_to_bsr(model, min_sparsity=0.1, optimizer=optimizer)
    assert "stored blocks of 1 weights" in report.notes[-1]
    assert not model[2].values.requires_grad
    before = model[2].values.clone()
    step(model, optimizer, batches(1)[0])
    assert torch.equal(model[2].values, before)


def test_an_interruption_leaves_model_and_optimizer_as_they_were_or_both_swapped():
    held = []

    def fresh():
        _, (model, optimizer) = twins(OPTIMIZERS["adam"], before=1)
        held[:] = [model, optimizer, portrait(model, optimizer)]
        return lambda: swap_to_bsr(model, min_sparsity=0.1, optimizer=optimizer)

    swapped = 0
    for _ in each_interruption(fresh, step=5):
        model, optimizer, before = held
        if isinstance(model[0], BSRLinear):
            swapped += 1
            parameters = {id(p) for p in model.parameters()}
            assert {id(model[0].values), id(model[2].values)} <= set(map(id, optimizer.state))
            assert parameters <= {id(p) for p in optimizer.param_groups[0]["params"]}
        else:
            assert_same(before, portrait(model, optimizer))
    assert swapped <= 3  # the lines after the last change


def test_distributed_wraps_the_swapped_model_again(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        model = masked_model()
        ddp = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
        for x in batches(2):
            step(ddp, optimizer, x)
        squash(model)
        swap_to_bsr(ddp.module, min_sparsity=0.1, optimizer=optimizer)
        again = nn.parallel.DistributedDataParallel(ddp.module)
        values = model[0].values.clone()
        for x in batches(2):
            step(again, optimizer, x)
        assert not torch.equal(values, model[0].values)
    finally:
        dist.destroy_process_group()


def test_an_average_of_the_weights_is_not_moved():
    # Its parameters are other tensors: it is swapped on its own.
    _, (model, optimizer) = twins(OPTIMIZERS["sgd"])
    average = swa_utils.AveragedModel(model)
    swap_to_bsr(model, min_sparsity=0.1, optimizer=optimizer)
    swap_to_bsr(average, min_sparsity=0.1)
    assert isinstance(average.module[0], BSRLinear)
    assert torch.equal(average.module[0].values, model[0].values)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}, {"foreach": True}])
def test_on_a_gpu(options):
    result = []
    for swap in (False, True):
        model = masked_model().cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
        xs = [x.cuda() for x in batches(20)]
        for x in xs[:3]:
            step(model, optimizer, x)
        if swap:
            squash(model)
            swap_to_bsr(model, min_sparsity=0.1, optimizer=optimizer)
        result.append(torch.tensor([step(model, optimizer, x) for x in xs]))
    torch.testing.assert_close(*result, rtol=1e-4, atol=0)
