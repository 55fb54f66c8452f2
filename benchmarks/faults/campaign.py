"""Runs cases in processes of their own, so that one that crashes or hangs is a fault like any other.

A worker announces each case before it starts it. If it then ends, or says nothing for too long, that case is at fault
and another worker goes on behind it.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

from benchmarks.faults import sanitizer
from benchmarks.faults.case import Kind, NotHere, Outcome, attempt

ROOT = Path(__file__).resolve().parents[2]
# A kind that keeps crashing or hanging would take the whole time.
MOST_CRASHES = 3
_WORKER = "from benchmarks.faults.campaign import work; work()"
_KINDS = "benchmarks.faults.campaign:kinds"


def kinds() -> dict[str, Kind]:
    """All kinds by name. (Imports the package, so not before the sanitized kernel is in its place.)"""
    from benchmarks.faults.exceptions import INTERRUPTED
    from benchmarks.faults.files import FILES
    from benchmarks.faults.forks import FORKS
    from benchmarks.faults.gradients import GRADIENTS
    from benchmarks.faults.kills import KILLS
    from benchmarks.faults.op_calls import OP_CALLS
    from benchmarks.faults.soak import SOAK
    from benchmarks.faults.state_dicts import STATE_DICTS
    from benchmarks.faults.threads import THREADS

    groups = (FILES, STATE_DICTS, OP_CALLS, GRADIENTS, INTERRUPTED, KILLS, THREADS, FORKS, SOAK)
    return {kind.name: kind for group in groups for kind in group}


@dataclass
class Result:
    """What a kind came to.

    Attributes:
        outcomes: of the cases that were tried.
        planned: how many there were to try.
        missing: why cases were not tried; empty if all were.
    """

    planned: int
    outcomes: list[Outcome] = field(default_factory=list)
    missing: str = ""

    @property
    def faults(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.fault]


Piece = tuple[Kind, range]


def run(
    pieces: Sequence[Piece],
    *,
    jobs: int,
    builds: Path,
    source: str = _KINDS,
    tell: Callable[[Outcome], None] = lambda outcome: None,
) -> dict[str, Result]:
    """Tries cases.

    Args:
        pieces: kinds and indices; those of one kind may be in several pieces.
        jobs: workers at a time.
        builds: where sanitized kernels are kept.
        source: where workers find the kinds: a module and a function in it that returns them by name.
        tell: called after every case.

    Returns:
        A result for each kind, by name, outcomes in the order of their indices.
    """
    results = {kind.name: Result(0) for kind, _ in pieces}
    for kind, indices in pieces:
        results[kind.name].planned += len(indices)
    lock = threading.Lock()

    def one(lane: list[Piece]) -> None:
        environment = dict(os.environ)
        if lane[0][0].sanitizer:
            try:
                environment |= sanitizer.environment(sanitizer.build(builds))
            except NotHere as reason:
                for kind, _ in lane:
                    results[kind.name].missing = str(reason)
                return
        todo = [(kind, list(indices)) for kind, indices in lane]
        while todo:
            todo = _one_worker(todo, environment, source, note, results)

    def note(outcome: Outcome) -> None:
        with lock:
            results[outcome.kind].outcomes.append(outcome)
            tell(outcome)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, _lanes(pieces)))
    for result in results.values():
        result.outcomes.sort(key=lambda outcome: outcome.index)
    return results


def _lanes(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """What one worker after the other does: large pieces alone, small ones together; none mixes the two kernels."""
    lanes: list[list[Piece]] = []
    for sanitized in (True, False):
        mine = [piece for piece in pieces if piece[0].sanitizer is sanitized]
        small = [piece for piece in mine if len(piece[1]) <= 1000]
        lanes += [small] if small else []
        lanes += [[piece] for piece in mine if len(piece[1]) > 1000]
    return lanes


def _one_worker(
    todo: list[tuple[Kind, list[int]]],
    environment: dict[str, str],
    source: str,
    note: Callable[[Outcome], None],
    results: dict[str, Result],
) -> list[tuple[Kind, list[int]]]:
    """Lets a worker do what is left; returns what it could not get to."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _WORKER, str(writer), source],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=[writer],
            env={**environment, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        os.close(writer)
        with process.stdin as stdin:
            stdin.write(json.dumps([(kind.name, indices) for kind, indices in todo]).encode())
        under_way: list[tuple[str, int]] = []
        hangs = False
        for message in _messages(reader, lambda: _patience(todo, under_way)):
            if message is None:
                hangs = True
                break
            if isinstance(message, list):
                under_way[:] = [tuple(message)]
                continue
            outcome = Outcome(**message)
            note(outcome)
            _done(todo, outcome.kind, outcome.index)
            under_way.clear()
        if hangs:
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        errors.seek(0)
        text = errors.read()
    if not under_way:
        if todo:
            raise RuntimeError(f"a worker ended ({status}) between two cases: {text[-2000:]}")
        return []
    name, index = under_way[0]
    kind = next(kind for kind, _ in todo if kind.name == name)
    fault = (
        f"hangs (no answer within {kind.patience:.0f} s)" if hangs else _how_it_ended(status, text)
    )
    note(Outcome(name, index, "fault", fault, _last_words(text)))
    _done(todo, name, index)
    crashes = [o for o in results[name].faults if o.fault.startswith(("crashes", "hangs"))]
    if len(crashes) >= MOST_CRASHES and any(k is kind for k, _ in todo):
        results[name].missing = f"given up after {len(crashes)} crashes"
        todo = [(k, indices) for k, indices in todo if k is not kind]
    return todo


def _done(todo: list[tuple[Kind, list[int]]], name: str, index: int) -> None:
    for kind, indices in todo:
        if kind.name == name and index in indices:
            indices.remove(index)
    todo[:] = [(kind, indices) for kind, indices in todo if indices]


def _patience(todo: list[tuple[Kind, list[int]]], under_way: list[tuple[str, int]]) -> float:
    """Seconds to wait for the next message; between cases, torch is imported."""
    if not under_way:
        return 300.0
    return next(kind.patience for kind, _ in todo if kind.name == under_way[0][0])


def _messages(reader: int, patience: Callable[[], float]) -> Iterator[object]:
    """What a worker sends; None if it is silent for too long."""
    received: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with os.fdopen(reader) as stream:
            for line in stream:
                received.put(line)
        received.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = received.get(timeout=patience())
        except queue.Empty:
            yield None
            return
        if line is None:
            return
        yield json.loads(line)


def _how_it_ended(status: int, text: str) -> str:
    report = re.search(r"SUMMARY: (\w+Sanitizer): (\S+).* in (\w+)", text)
    if report:
        return f"crashes: {report[1]}, {report[2]} in {report[3]}"
    if error := re.search(r"runtime error: (.*)", text):
        return f"crashes: {error[1]}"
    if status < 0:
        return f"crashes: {signal.Signals(-status).name}"
    return f"crashes: exit status {status}"


def _last_words(text: str) -> str:
    report = re.search(r"==\d+==ERROR: (.*?)(?=\n\n|\Z)", text, re.DOTALL)
    return (report[1] if report else text)[-1500:].strip()


def work() -> None:
    """The program of a worker: jobs come on stdin; messages go to a file descriptor; the kinds are found by name."""
    sanitizer.use()
    import torch

    torch.set_num_threads(1)
    if sanitizer.VARIABLE in os.environ:
        sanitizer.check()
    module, _, function = sys.argv[2].partition(":")
    known = getattr(import_module(module), function)()
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as out:
        os.set_inheritable(out.fileno(), False)
        for name, indices in json.load(sys.stdin):
            for index in indices:
                print(json.dumps([name, index]), file=out)
                print(json.dumps(asdict(attempt(known[name], index))), file=out)
