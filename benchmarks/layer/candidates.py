"""The candidates of a forward: dense, ours, and the peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.layer.cells import Cell
from benchmarks.layer.operands import Operands, bsr_linear
from benchmarks.measure.cuda import copies_beyond_cache
from benchmarks.measure.quiet import quiet
from benchmarks.measure.rounds import Candidate

PEERS = ("torch BSR", "torchao")


def or_raise(build: Callable[[], Candidate]) -> Candidate:
    """A candidate that cannot even be built fails when called, so that it is reported like one that fails later."""
    try:
        return build()
    except Exception as error:
        failure = error

        def fail() -> None:
            raise failure

        return fail


def make_candidates(operands: Operands, cell: Cell, device: torch.device) -> dict[str, Candidate]:
    """Dense, ours and the peers as functions without arguments; lists of them, on copies, if the cell is a graph."""
    x, bias, weight = operands.x, operands.bias, operands.weight

    def copies(nbytes: int) -> range:
        return range(copies_beyond_cache(nbytes, device) if cell.graph else 1)

    def dense() -> Candidate:
        # What a user without sparsity has: no zeros.
        weights = [
            torch.randn_like(weight.dense) * weight.dense.shape[1] ** -0.5
            for _ in copies(weight.dense.nbytes)
        ]
        return [lambda w=w: F.linear(x, w, bias) for w in weights]

    def dense_with_zeros() -> Candidate:
        return lambda: F.linear(x, weight.dense, bias)

    def ours() -> Candidate:
        weights = [
            replace(weight, values=weight.values.clone()) for _ in copies(weight.values.nbytes)
        ]
        return [lambda w=w: bsr_linear(operands, w) for w in weights]

    def torch_bsr() -> Candidate:
        sparse = weight.dense.to_sparse_bsr(tuple(weight.values.shape[1:]))
        weights = [sparse.clone() for _ in copies(weight.values.nbytes)]
        return [lambda w=w: F.linear(x, w, bias) for w in weights]

    def torchao() -> Candidate:
        from torchao.sparsity.blocksparse import BlockSparseTensor

        if not isinstance(cell.block, int):
            raise ValueError("only square blocks")
        weights = [
            BlockSparseTensor.from_dense(weight.dense, cell.block)
            for _ in copies(weight.values.nbytes)
        ]
        return [lambda w=w: F.linear(x, w, bias) for w in weights]

    builders = {"dense": dense, "ours": ours}
    if device.type == "cuda" and not cell.graph:
        builders["dense with zeros"] = dense_with_zeros
    if cell.peers:
        builders["torch BSR"] = torch_bsr
        if device.type == "cuda":
            builders["torchao"] = torchao
    with quiet():
        return {name: or_raise(build) for name, build in builders.items()}
