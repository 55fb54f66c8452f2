"""Deals cells out to worker processes, on one or more devices, until all are done or time is up."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from benchmarks.cells.question import Cell, Question, Row
from benchmarks.cells.results import Results
from benchmarks.measure.quiet import quiet
from benchmarks.report.facts import device_name
from benchmarks.report.progress import Progress

CLOSING_SECONDS = 8.0
"""Kept back from a budget, for the report and the pictures."""


def _work(question: Question, device: str, threads: int, pipe: Connection) -> None:
    """Runs the cells that come through `pipe` until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends the workers
    torch.set_num_threads(threads)
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    loaded = False
    while True:
        try:
            cell = pipe.recv()
        except EOFError:
            return
        try:
            with quiet():
                if not loaded:
                    pipe.send(("tick", "loading"))
                    question.load(where)
                    loaded = True
                start = time.monotonic()
                row = question.run(cell, lambda text: pipe.send(("tick", text)))
            seconds = round(time.monotonic() - start, 1)
            facts = {"seconds": seconds, "device": device_name(where), "torch": torch.__version__}
            pipe.send(("row", {**row, **facts}))
        except (BrokenPipeError, ConnectionResetError):  # the parent is gone
            return
        except Exception as error:
            pipe.send(("failed", f"{type(error).__name__}: {error}"[:300], traceback.format_exc()))


@dataclass
class _Worker:
    """A process, our end of its pipe, and what it is at."""

    process: Any
    pipe: Connection
    cell: Cell | None = None
    started: float = 0.0
    doing: str = ""

    def give(self, cell: Cell, now: float) -> None:
        self.cell, self.started, self.doing = cell, now, "starting"
        self.pipe.send(cell)


def _start(question: Question, device: str, threads: int) -> _Worker:
    # spawn: CUDA does not survive a fork
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(question, device, threads, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _stop(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.terminate()
    worker.process.join()


def seconds_needed(question: Question, rows: dict[Cell, Row], cell: Cell, device: str) -> float:
    """An upper estimate for a cell, from the slowest finished one of its setting.

    Args:
        question: knows the work of a cell.
        rows: finished cells.
        cell: to be run; if none of its setting is finished, the question's other settings serve.
        device: name of the hardware, as in the rows; threads in brackets do not count.

    Returns:
        0.0 if nothing is known yet.
    """
    hardware = device.split(" (")[0]
    rates: dict[str, list[float]] = {}
    for other, row in rows.items():
        if str(row.get("device")).split(" (")[0] == hardware:
            rate = float(row["seconds"]) / question.work(other)
            rates.setdefault(other.setting, []).append(rate)
    asked = dict.fromkeys(cell.setting for cell in question.cells())
    known = rates.get(cell.setting) or [r for s in asked for r in rates.get(s, [])]
    return max(known, default=0.0) * question.work(cell)


def run_cells(
    question: Question,
    results: Results,
    *,
    devices: Sequence[str],
    threads: int,
    budget: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Row]:
    """Runs every cell of the question that `results` does not have, and adds its row.

    Args:
        question: what is asked.
        results: where rows go, each as soon as it is there.
        devices: one entry a worker, e.g. `["cuda:0", "cuda:1", "cuda:0", "cuda:1"]`.
        threads: CPU threads of each worker.
        budget: seconds; a cell that by the finished ones would not end in time is not begun, and
            what still runs at the end is stopped. None: no limit.
        clock: seconds that pass.

    Returns:
        A row for each cell that is left: which, and why.
    """
    begin = clock()
    cells = question.cells()
    todo = [cell for cell in cells if cell not in results.rows]
    progress = Progress(len(cells), question.name)
    progress.done = len(cells) - len(todo)
    left: list[Row] = []
    hardware = device_name(devices[0])

    def leave(cell: Cell, because: str) -> None:
        left.append({"left": str(cell), "because": because})

    def next_cell() -> Cell | None:
        """The next cell that fits into the time left; those that do not are left."""
        while todo:
            cell = todo.pop(0)
            needs = seconds_needed(question, results.rows, cell, hardware)
            spent = clock() - begin
            if budget is None or spent + needs <= budget:
                return cell
            leave(cell, f"needs about {needs:.0f} s; {spent:.0f} s of {budget:.0f} s were spent")
        return None

    def receive(worker: _Worker) -> None:
        """Takes one message; a worker that died leaves its cell."""
        assert worker.cell is not None
        try:
            kind, *content = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            code = worker.process.exitcode
            leave(worker.cell, f"the worker process ended with exit code {code}")
            progress.step(f"{worker.cell} failed")
            worker.cell = None
            return
        if kind == "tick":
            worker.doing = content[0]
            return
        if kind == "row":
            results.add(worker.cell, content[0])
            score = content[0].get(question.metric)
            progress.step(f"{worker.cell}: {score} {question.unit}")
        else:
            leave(worker.cell, content[0])
            print(f"\n{worker.cell}:\n{content[1]}", file=sys.stderr)
            progress.step(f"{worker.cell} failed")
        worker.cell = None

    workers: list[_Worker | None] = [None] * min(len(devices), len(todo))
    try:
        while True:
            for i, worker in enumerate(workers):
                if worker is not None and worker.cell is not None:
                    continue
                if (cell := next_cell()) is None:
                    break
                if worker is None or not worker.process.is_alive():
                    worker = workers[i] = _start(question, devices[i], threads)
                worker.give(cell, clock())
            busy = [w for w in workers if w is not None and w.cell is not None]
            if not busy:
                break
            remaining = None if budget is None else budget - (clock() - begin)
            if remaining is not None and remaining <= 0:
                for worker in busy:
                    ran = clock() - worker.started
                    leave(worker.cell, f"stopped after {ran:.0f} s: the time was up")
                for cell in todo:
                    leave(cell, "the time was up")
                break
            pipes = {w.pipe: w for w in busy}
            pause = 5.0 if remaining is None else min(5.0, remaining)
            for pipe in wait(list(pipes), timeout=pause):
                receive(pipes[pipe])
            progress.show(" | ".join(f"{w.cell} {w.doing}" for w in busy if w.cell is not None))
    except KeyboardInterrupt:
        for cell in [w.cell for w in workers if w is not None and w.cell is not None] + todo:
            leave(cell, "interrupted")
    finally:
        for worker in workers:
            if worker is not None:
                _stop(worker)
        progress.close()
    return left
