"""Training the kept weights of one part of a model at a time to do what the dense part did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchao_superblock.pruning.one_shot.calibration import Calibration
from torchao_superblock.pruning.one_shot.capture import Target
from torchao_superblock.pruning.one_shot.forwards import copied, is_plain

_STEP = 0.02
"""First step of Adam as a fraction of the root mean square of a tensor's kept weights."""


def find_parts(model: nn.Module, groups: Sequence[Sequence[Target]]) -> list[nn.Module]:
    """The parts to refine: the blocks of a transformer, say, each with two or more groups.

    They are the elements of the outermost `nn.ModuleList`s and `nn.Sequential`s for which this
    holds; a model without such a container is one part.
    """

    def n_groups(module: nn.Module) -> int:
        own = {id(parameter) for parameter in module.parameters()}
        return sum(any(id(target.weight) in own for target in group) for group in groups)

    def search(module: nn.Module) -> list[nn.Module]:
        if isinstance(module, nn.ModuleList | nn.Sequential):
            parts = [child for child in module.children() if n_groups(child) > 1]
            if parts:
                return parts
        return [part for child in module.children() for part in search(child)]

    return search(model) or ([model] if n_groups(model) > 1 else [])


def refine(
    calibration: Calibration, part: nn.Module, masks: Mapping[Target, Tensor], steps: int
) -> tuple[float, float]:
    """Trains the kept weights and the biases of one part's targets; the better ones stay.

    Minimises ||f_dense(x_dense) - f_pruned(x_pruned)||^2 over the part's outputs with Adam, one
    batch a step.

    Args:
        calibration: after all groups of the part are done.
        part: a module.
        masks: full-size bool masks of its targets.
        steps: of Adam.

    Returns:
        The loss before and after, as a fraction of the power of the dense outputs.

    Raises:
        ValueError: if the part cannot be called again with the same arguments.
    """
    forwards, pruned = calibration.forwards, calibration.pruned
    samples = []
    for batch in range(len(calibration.batches)):
        count = forwards.calls[batch][part]
        outputs = _calls(calibration, calibration.dense, part, batch, count, inputs=False)
        inputs = _calls(calibration, pruned, part, batch, count, inputs=True)
        mask = calibration.token_mask(batch)
        samples += [(*one, mask) for one in zip(inputs, outputs, strict=False)]
    if not samples:
        return 0.0, 0.0
    start = {target: pruned.replaced[target] for target in masks}
    leaves: dict[Target, tuple[Tensor, Tensor | None]] = {}
    for target, (weight, bias) in start.items():
        leaves[target] = (_leaf(weight), None if bias is None else _leaf(bias))

    def rounded() -> dict[Target, tuple[Tensor, Tensor | None]]:
        return {
            target: (
                (weight * masks[target]).to(start[target][0].dtype),
                None if bias is None else bias.to(start[target][1].dtype),
            )
            for target, (weight, bias) in leaves.items()
        }

    def loss_of(sample, weights) -> Tensor:
        (args, kwargs), wanted, mask = sample
        args, kwargs = copied((args, kwargs))
        output = forwards.rerun(part, args, kwargs, {**pruned.replaced, **weights})
        return _distance(output, wanted, mask)

    def total(weights) -> float:
        with torch.no_grad():
            return sum(loss_of(sample, weights).item() for sample in samples) / len(samples)

    parameters = [leaf for pair in leaves.values() for leaf in pair if leaf is not None]
    # Steps in proportion to each tensor's size; biases that are about zero follow their weights.
    sizes = [
        weight[masks[target]].square().mean().sqrt().item()
        for target, (weight, bias) in leaves.items()
        for leaf in (weight, bias)
        if leaf is not None
    ]
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": _STEP * size} for p, size in zip(parameters, sizes, strict=True)],
        betas=(0.9, 0.99),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1))
    )
    before = total(start)
    for step in range(steps):
        with torch.enable_grad():
            loss = loss_of(samples[step % len(samples)], rounded())
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        trained = {t: (w.masked_fill(~masks[t], 0), b) for t, (w, b) in rounded().items()}
    after = total(trained)
    if not after < before:
        return before, before
    pruned.replaced.update(trained)
    pruned.forget(part)
    return before, after


def _leaf(tensor: Tensor) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def _calls(calibration, stream, part: nn.Module, batch: int, count: int, *, inputs: bool) -> list:
    """Inputs or outputs of each call of a part in one forward."""
    found: list = []

    def on_module(args, kwargs, compute):
        if inputs:
            if not is_plain((args, kwargs)):
                raise ValueError(
                    f"{calibration.caller}: refine_steps needs to call {type(part).__name__} again "
                    "and again, but it is called with something besides tensors and numbers, such "
                    "as a cache (switch it off, use_cache=False), which a call may change"
                )
            found.append(copied((args, kwargs)))
        if inputs and len(found) == count:
            raise calibration.forwards.stop()
        output = compute()
        if not inputs:
            found.append(copied(output))
            if len(found) == count:
                raise calibration.forwards.stop()
        return output

    if count:
        calibration.forwards.run(stream, batch, on_module=(part, on_module))
    return found


def _distance(output: object, wanted: object, mask: Tensor | None) -> Tensor:
    """Squared distance of the tensors of two outputs, as a fraction of the power of the second."""
    distance = power = torch.zeros((), device="cpu")
    for a, b in zip(pytree.tree_leaves(output), pytree.tree_leaves(wanted), strict=True):
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        if mask is not None and a.shape[: mask.ndim] == mask.shape:
            a, b = a[mask], b[mask]
        elif mask is not None and a.shape[: mask.ndim] == mask.T.shape:
            a, b = a[mask.T], b[mask.T]
        a, b = a.float(), b.float()
        distance = distance + (a - b).square().sum().cpu()
        power = power + b.square().sum().cpu()
    return distance / power.clamp(min=torch.finfo(torch.float32).tiny)
