"""A question whose cells do what their method says; a module of its own, for the worker processes to import."""

import os
from dataclasses import dataclass

from benchmarks.judge.cells import Cell, sweep


@dataclass
class Toy:
    methods: tuple[str, ...]
    seeds: int = 1
    name: str = "toy"
    title: str = "Toy"
    metric: str = "score"
    unit: str = "points"
    decimals: int = 1
    higher_is_better: bool = True

    def check(self):
        pass

    def cells(self):
        return sweep(["toy"], self.methods, [(16, 0.9)], self.seeds)

    def work(self, cell):
        return 2.0

    def load(self, device):
        self.loads = getattr(self, "loads", 0) + 1

    def run(self, cell: Cell, tick):
        if cell.method == "dies":
            os._exit(3)
        if cell.method == "fails":
            raise ArithmeticError("no result")
        while cell.method == "endless":
            tick("again")
        return {"score": 10 + cell.seed, "pruned": 0.9, "loads": self.loads}
