"""Which layers a forward shows to one-shot pruning: attention, fused layers, modules used twice, compiled ones."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.pruning.one_shot_case import EVERY, correlated, encoder, kept_of, prune, reference
from torchao_superblock import swap_to_bsr


def test_attention_and_fused_encoder_layers_count_in_the_order_of_the_forward():
    model, x = encoder(), correlated(8, 6, 16)
    report = prune(model, [x], config=EVERY)
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"]
    names += ["linear2.weight"]
    assert [entry.fqn for entry in report.tensors] == [
        f"layers.{i}.{n}" for i in (0, 1) for n in names
    ]
    for entry in report.tensors:
        assert entry.note == "" and entry.sparsity == 0.5
        assert (model.get_parameter(entry.fqn) == 0).float().mean() == 0.5
    assert model.training
    # The fused path, which is back, gives what was solved for.
    model.eval()
    with torch.inference_mode():
        assert model(x).isfinite().all()


def test_the_layer_at_hand_sees_what_the_pruned_layers_before_it_give():
    # The error that was reported, from replayed forwards, is that of the model as it is now.
    model, x = encoder(dropout=0.0), correlated(8, 6, 16)
    dense = copy.deepcopy(model).eval()
    report = prune(model, x.split(4), config=EVERY, solve_dtype=torch.float64)
    model.eval()
    for entry in report.tensors:
        if not entry.fqn.endswith(("linear1.weight", "linear2.weight")):
            continue
        name = entry.fqn.removesuffix(".weight")
        out = []
        for one in (dense, model):
            module = one.get_submodule(name)
            seen = []
            hook = module.register_forward_hook(lambda m, a, y, seen=seen: seen.append(y))
            with torch.no_grad():
                one.train()(x)  # dropout is 0: the path that is not fused
            hook.remove()
            out.append(seen[0])
        lost = (out[0] - out[1]).square().sum()
        power = (out[0] - out[0].mean((0, 1))).square().sum()
        assert entry.error == pytest.approx((lost / power).item(), rel=2e-2)


def test_cross_attention_solves_query_rows_and_memory_rows_by_their_own_inputs():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, memory):
            return self.attention(x, memory, memory)[0]

    model = Cross()
    with torch.no_grad():
        model.attention.in_proj_bias.normal_()
    dense = copy.deepcopy(model)
    x, memory = correlated(20, 5, 8), correlated(20, 7, 8)
    name = "attention.in_proj_weight"
    prune(model, [(x, memory)], 0.0, 4, [{"tensor_fqn": name}], damping=0.5)
    # At level 0 and equal streams the best weights are the dense ones.
    torch.testing.assert_close(model.get_parameter(name), dense.get_parameter(name))
    prune(
        model,
        [(x, memory)],
        0.5,
        4,
        [{"tensor_fqn": name}],
        damping=0.01,
        solve_dtype=torch.float64,
    )
    weight, bias = model.get_parameter(name).double(), model.attention.in_proj_bias.double()
    old, old_bias = dense.get_parameter(name).double(), dense.attention.in_proj_bias.double()
    for rows, given in ((slice(0, 8), x), (slice(8, 24), memory)):
        given = given.reshape(-1, 8).double()
        mean = given.mean(0)
        centered = given - mean
        h = centered.T @ centered / len(given)
        pull = 0.01 * h.diagonal().mean()
        gradient = (weight - old)[rows] @ h + pull * (weight - old)[rows]
        # Stationary in the kept weights, and means are met.
        assert gradient[weight[rows] != 0].abs().max() < 1e-5
        shift = old_bias[rows] + old[rows] @ mean - weight[rows] @ mean
        torch.testing.assert_close(bias[rows], shift, rtol=1e-4, atol=1e-5)


class Gate(nn.Module):
    """Two layers that share an input, in the manner of a language model's MLP."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_the_dict_of_a_tokenizer_and_its_attention_mask():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 8)
            self.layers = nn.ModuleList([Gate(), Gate()])

        def forward(self, input_ids, attention_mask):
            x = self.embedding(input_ids)
            for layer in self.layers:
                x = x + layer(x)
            return {"last_hidden_state": x}

    model = Model()
    ids = torch.randint(1, 50, (16, 10))
    mask = (torch.arange(10) < torch.randint(3, 11, (16, 1))).long()
    other = copy.deepcopy(model)
    report = prune(model, [{"input_ids": ids * mask, "attention_mask": mask}])
    assert len(report.tensors) == 6 and {entry.note for entry in report.tensors} == {""}
    # The same without the padding, one sequence a batch.
    alone = [(ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(mask.sum(1).tolist())]
    prune(other, alone)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_mask_fn_keeps_padding_out_of_attention_too(batch_first):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    x = correlated(6, 6, 8)  # batch and sequence of one length, so that shapes tell nothing
    mask = torch.arange(6) < torch.tensor([6, 3, 2, 5, 1, 4])[:, None]
    names = [{"tensor_fqn": "in_proj_weight"}, {"tensor_fqn": "out_proj.weight"}]

    def pruned(noise: Tensor) -> nn.Module:
        model = copy.deepcopy(attention)
        given = torch.where(mask[..., None], x, noise)
        given = given if batch_first else given.transpose(0, 1)
        batch = {"query": given, "key": given, "value": given, "key_padding_mask": ~mask}
        prune(model, [batch], config=names, mask_fn=lambda batch: ~batch["key_padding_mask"])
        return model

    a, b = pruned(torch.zeros(6, 6, 8)), pruned(100 * torch.randn(6, 6, 8))
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_module_used_twice_is_solved_for_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, x):
            return self.block(self.block(x))

    model, x = Twice(), correlated(200, 8)
    dense = copy.deepcopy(model)
    prune(model, [x], damping=0.01, solve_dtype=torch.float64)
    with torch.no_grad():
        both = torch.cat([x, dense.block(x)])
    linear = dense.block[0]
    mask, weight, _ = reference(
        linear.weight.detach(), linear.bias.detach(), both, both, 0.5, (4, 4), 0.01
    )
    assert torch.equal(kept_of(model.block[0].weight, 4, 4), mask)
    torch.testing.assert_close(model.block[0].weight.double(), weight, rtol=1e-3, atol=1e-4)


def test_modules_that_write_to_their_inputs_are_not_replayed_wrongly():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x.relu_()) + 1

    class Model(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.first, self.middle, self.last = InPlace(), nn.Linear(8, 8), nn.Linear(8, 8)
            self.in_place = in_place

        def forward(self, x):
            x = x.clone()
            y = self.first(x if self.in_place else x.relu())
            # Whoever gives out what `first` returned, and does no more, leaves x as it was.
            y.add_(x if self.in_place else x.relu())
            return self.last(self.middle(y).tanh_())

    model = Model(True)
    other = Model(False)
    other.load_state_dict(model.state_dict())
    x = correlated(100, 8)
    for one in (model, other):
        prune(one, [x])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_outputs_that_are_written_to_are_given_again_as_they_were():
    class Model(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.layers, self.in_place = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), in_place

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).mul_(2) if self.in_place else layer(x) * 2
            return x

    model, other = Model(True), Model(False)
    other.load_state_dict(model.state_dict())
    x = correlated(100, 8)
    for one in (model, other):
        prune(one, [x])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_router_that_sends_other_tokens_once_pruned_is_noted():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.expert = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            score = self.router(x)
            return self.expert(x[score[:, 0] > score[:, 1]])

    report = prune(Routed(), [correlated(500, 8)], blocksize=2, level=0.7)
    assert [entry.note for entry in report.tensors] == [
        "",
        "own outputs as target: other tokens reach it once pruned",
    ]


def test_a_bias_with_another_user_is_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    bias = model[0].bias.detach().clone()
    report = prune(model, [correlated(100, 8)])
    assert torch.equal(model[0].bias, bias)
    assert {entry.note for entry in report.tensors} == {"its bias is not its own and stays"}


def test_every_module_is_computed_about_once_for_each_model():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(8, 8), 0

        def forward(self, x):
            self.calls += 1
            return self.linear(x).tanh()

    model = nn.Sequential(*[Counted() for _ in range(12)])
    report = prune(model, [correlated(50, 8)])
    assert len(report.tensors) == 12
    # Once to find the layers, then twice a stream: up to its layer, and whole.
    assert max(module.calls for module in model) <= 5


def test_a_compiled_model_is_looked_into():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    plain, x = copy.deepcopy(model), correlated(100, 8)
    report = prune(torch.compile(model, backend="eager"), [x])
    prune(plain, [x])
    assert [entry.fqn for entry in report.tensors] == ["0.weight", "2.weight"]
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_comes_out_can_be_swapped():
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    x = correlated(300, 64)
    prune(model, [x], 0.75, 16)
    with torch.no_grad():
        before = model(x)
        report = swap_to_bsr(model, 16, min_sparsity=0.5)
        assert len(report.swapped) == 2
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_it_runs_without_tqdm():
    code = """
import sys
sys.modules["tqdm"] = sys.modules["tqdm.auto"] = None
import torch
from torchao_superblock import prune_one_shot
print(prune_one_shot(torch.nn.Sequential(torch.nn.Linear(8, 8)), [torch.randn(9, 8)], 0.5, 4).sparsity)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert result.stdout.strip() == "0.5", result.stderr
