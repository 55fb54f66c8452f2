"""Random gradients, of the op and of masked training, against dense float64."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.faults.case import Fault, Kind
from benchmarks.faults.problems import (
    TOLERANCE,
    Problem,
    doubled,
    error_of,
    random_problem,
    reference,
)
from torchao_superblock import BSRLinear, SupermaskSparsifier, squash
from torchao_superblock.ops import bsr_linear, build_plan


def check(name: str, out: Tensor | None, expected: Tensor, dtype: torch.dtype) -> None:
    """Raises a fault unless `out` is `expected` up to rounding."""
    if out is None:
        raise Fault(f"no {name}")
    if out.dtype != dtype:
        raise Fault(f"{name} of another dtype", f"{out.dtype}, not {dtype}")
    error = error_of(out, expected)
    if not error <= TOLERANCE[dtype]:
        raise Fault(f"wrong {name}", f"error {error:.2e} in {dtype}, shape {tuple(out.shape)}")


def check_gradients(problem: Problem, *, forward_too: bool = True) -> None:
    """Runs the op forward and backward and compares.

    Raises:
        Fault: an output or a gradient is wrong.
    """
    p, dtype = problem, problem.x.dtype
    x, values = (tensor.detach().requires_grad_() for tensor in (p.x, p.values))
    bias = None if p.bias is None else p.bias.detach().requires_grad_()
    y = bsr_linear(x, p.crow, p.col, values, bias, p.out_features, p.activation, p.plan)
    operands = [doubled(p.x), doubled(p.values), doubled(p.bias)]
    expected = reference(p, *operands)
    if forward_too:
        check("output", y, expected, dtype)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    expected.backward(grad.double())
    for name, leaf, operand in zip(
        ("x", "values", "bias"), (x, values, bias), operands, strict=True
    ):
        if leaf is not None:
            check(f"gradient of {name}", leaf.grad, operand.grad, dtype)


class OpGradients(Kind):
    """Random problems, with every dtype, activation, layout and raggedness."""

    name = "gradients/op"
    about = "random problems of the op, forward and backward against dense float64"
    short, long = 250, 7000

    def run(self, index: int) -> str:
        source = self.random(index)
        problem = random_problem(source)
        if source.random() < 0.2:
            self._twice(problem)
            return "right twice"
        check_gradients(problem)
        return "right"

    @staticmethod
    def _twice(p: Problem) -> None:
        """The gradient of a gradient, in float64."""
        x, values, bias = doubled(p.x), doubled(p.values), doubled(p.bias)
        leaves = [leaf for leaf in (x, values, bias) if leaf is not None]

        def second(y: Tensor) -> list[Tensor | None]:
            first = torch.autograd.grad(y.pow(2).sum(), leaves, create_graph=True)
            total = sum((g.pow(2).sum() for g in first), start=torch.zeros(()).double())
            return torch.autograd.grad(total, leaves, allow_unused=True)

        ours = bsr_linear(x, p.crow, p.col, values, bias, p.out_features, p.activation, p.plan)
        for out, expected in zip(second(ours), second(reference(p, x, values, bias)), strict=True):
            expected = torch.zeros(()) if expected is None else expected
            out = torch.zeros_like(expected) if out is None else out
            error = error_of(out, expected.expand_as(out))
            if not error <= 1e-10:
                raise Fault("wrong second gradient", f"error {error:.2e}")


class MaskedGradients(Kind):
    """A layer in training: the mask's straight-through gradient."""

    name = "gradients/masked"
    about = "masked layers in training, forward and backward against dense float64, then squashed"
    short, long = 120, 3000

    def run(self, index: int) -> str:
        source = self.random(index)
        blocksize = tuple(source.choice([1, 2, 3, 4, 8, 16]) for _ in "rc")
        N, K = (source.randint(max(2, block), 48) for block in blocksize)
        if (N, K) == blocksize:  # a single block is nothing to choose from, and refused
            N += 1
        dtype = source.choice([torch.float32, torch.float64, torch.bfloat16])
        model = nn.Sequential(nn.Linear(K, N, bias=source.random() < 0.5)).to(dtype)
        weight = model[0].weight
        level = source.choice([0.0, 0.3, 0.5, 0.8, 0.99])
        sparsifier = SupermaskSparsifier(level, blocksize)
        sparsifier.prepare(model)
        ((name, scores),) = ((n, p) for n, p in model.named_parameters() if n.endswith(".scores"))
        frozen = source.random() < 0.3
        if frozen:
            sparsifier.freeze()
            with torch.no_grad():  # what the held mask must not follow
                scores.copy_(torch.randn_like(scores))

        R, C = (-(-size // block) for size, block in zip((N, K), blocksize, strict=True))
        mask = sparsifier.state[sparsifier.groups[0]["tensor_fqn"]]["mask"]
        kept = max(1, round(R * C * (1 - level)))
        if mask.shape != (R, C) or int(mask.sum()) != kept:
            raise Fault("another number of blocks", f"{int(mask.sum())} of {R} x {C}, not {kept}")
        element = mask.repeat_interleave(blocksize[0], 0)[:N]
        element = element.repeat_interleave(blocksize[1], 1)[:, :K]

        x = torch.randn(source.choice([1, 3, 17]), K).to(dtype)
        bias = model[0].bias
        y = model(x)
        w, b = doubled(weight), doubled(bias)
        masked = w * element
        masked.retain_grad()
        expected = F.linear(x.double(), masked, b)
        check("output", y, expected, dtype)
        grad = torch.randn(y.shape).to(dtype)
        y.backward(grad)
        expected.backward(grad.double())
        check("gradient of weight", weight.grad, w.grad, dtype)
        if b is not None:
            check("gradient of bias", bias.grad, b.grad, dtype)
        # Straight through: the gradient of a block's score is the sum of grad * weight over the block.
        product = F.pad(
            masked.grad * w.detach(), (0, C * blocksize[1] - K, 0, R * blocksize[0] - N)
        )
        straight = product.view(R, blocksize[0], C, blocksize[1]).sum((1, 3))
        straight = torch.zeros_like(straight) if frozen else straight
        if scores.grad is None:
            raise Fault("no gradient of scores")
        error = error_of(scores.grad, straight)
        if not error <= max(TOLERANCE[dtype], TOLERANCE[torch.float32]):
            raise Fault("wrong gradient of scores", f"error {error:.2e}, {name}")

        squash(model)
        if model[0].weight is not weight or type(model[0]) is not nn.Linear:
            raise Fault("another layer after squash", type(model[0]).__name__)
        if bool((weight[~element] != 0).any()):
            raise Fault("pruned blocks that are not zero")
        check("output after squash", model(x), expected, dtype)
        return "right"


class StalePlans(Kind):
    """Indices that come to a layer, or to the op, by a way that makes no plan for them."""

    name = "gradients/stale-plan"
    about = "indices that changed behind a plan's back: right, or (written in place) refused"
    short, long = 60, 1000
    ways = ("another layer's plan", "functional_call", "written in place", "loaded")

    def run(self, index: int) -> str:
        source = self.random(index)
        way = self.ways[index % len(self.ways)]
        mine, other = same_size(source)
        layer, target = bsr_layer(mine), bsr_layer(other)
        x = mine.x.detach().requires_grad_()
        state = {key: tensor.clone() for key, tensor in target.state_dict().items()}
        values = state["values"].requires_grad_()
        if way == "another layer's plan":
            plan = build_plan(mine.crow, mine.col, mine.n_block_cols)
            y = bsr_linear(x, other.crow, other.col, values, plan=plan)
        elif way == "functional_call":
            y = functional_call(layer, state, (x,))
        else:
            if way == "loaded":
                layer.load_state_dict(state)
            else:
                with torch.no_grad():
                    for key, tensor in layer.state_dict().items():
                        tensor.copy_(state[key])
            values = layer.values
            try:
                y = layer(x)
            except RuntimeError:
                if way == "written in place":
                    return "refused"
                raise
        expected_x, expected_values = doubled(x), doubled(other.values)
        expected = reference(other, expected_x, expected_values, None)
        check(f"output ({way})", y, expected, x.dtype)
        grad = torch.randn(y.shape)
        y.backward(grad)
        expected.backward(grad.double())
        check(f"gradient of x ({way})", x.grad, expected_x.grad, x.dtype)
        check(f"gradient of values ({way})", values.grad, expected_values.grad, x.dtype)
        return "right"


def same_size(source: random.Random) -> tuple[Problem, Problem]:
    """Two problems with as many blocks in other places."""
    r, c = source.choice([1, 2, 8, 16]), source.choice([1, 2, 8, 16])
    R, C = source.randint(2, 6), source.randint(2, 6)
    nnz = source.randint(1, R * C)
    problems = []
    for _ in range(2):
        kept = torch.zeros(R * C, dtype=torch.bool)
        kept[torch.randperm(R * C)[:nnz]] = True
        kept = kept.view(R, C)
        crow = torch.zeros(R + 1, dtype=torch.int32)
        crow[1:] = kept.sum(1).cumsum(0)
        col = kept.nonzero()[:, 1].to(torch.int32)
        x, values = torch.randn(source.choice([1, 5, 40]), C * c), torch.randn(nnz, r, c)
        problems.append(Problem(x, crow, col, values, None, None, "none", None))
    return problems[0], problems[1]


def bsr_layer(problem: Problem) -> BSRLinear:
    """A layer without bias."""
    p = problem
    _, r, c = p.values.shape
    size = (p.x.shape[-1], (p.crow.shape[0] - 1) * r)
    return BSRLinear(*size, (r, c), p.crow.clone(), p.col.clone(), p.values.clone())


GRADIENTS = [OpGradients(), MaskedGradients(), StalePlans()]
