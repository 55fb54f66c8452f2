"""A process killed while it saves: the file is the old one or the new one, complete."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.faults import models
from benchmarks.faults.case import Fault, Kind
from benchmarks.faults.injection import Lines, count_lines
from torchao_superblock import save_bsr


class Kills(Kind):
    """A forked child saves and is killed: at a line of the package, or after a time that the case draws."""

    name = "kills"
    about = (
        "kill -9 while a model is saved over a file, at a line or at any time: the file is complete, and "
        "after the next save nothing else is left in the folder"
    )
    short, long = 16, 300

    def run(self, index: int) -> str:
        source = self.random(index)
        torch.set_num_threads(1)
        old, new = models.swapped("sequence", 1), models.swapped("sequence", 2)
        # Large enough that writing takes a while.
        for model in (old, new):
            model.register_buffer("large", torch.full((source.choice([1, 2**18, 2**22]),), 1.0))
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.safetensors"
            save_bsr(old, path)
            started = time.perf_counter()
            lines = count_lines(lambda: save_bsr(new, Path(directory) / "other.safetensors"))
            seconds = time.perf_counter() - started
            os.unlink(Path(directory) / "other.safetensors")
            # (all of the writing, and what comes after it, is in the last lines)
            at = source.choice(
                [source.randint(1, lines), source.randint(max(1, lines - 20), lines)]
            )
            delay = source.uniform(0, 3 * seconds)
            by_line = index % 2 == 0
            child = os.fork()
            if child == 0:
                try:
                    if by_line:
                        Lines(lambda: save_bsr(new, path), at, _kill_myself)
                    while True:
                        save_bsr(old, path)
                        save_bsr(new, path)
                finally:
                    os._exit(1)
            if not by_line:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                raise Fault("the child ended by itself", f"status {status}")
            where = f"at line {at} of {lines}" if by_line else f"after {delay * 1e3:.1f} ms"
            found = self._which(path, {"old": old, "new": new}, where)
            save_bsr(new, path)
            rest = sorted(set(os.listdir(directory)) - {path.name})
            if rest:
                raise Fault("files left for ever", f"killed {where}: {', '.join(rest)}")
            return f"the {found} file"

    @staticmethod
    def _which(path: Path, candidates: dict[str, torch.nn.Module], where: str) -> str:
        try:
            tensors = load_file(path)
        except Exception as error:
            raise Fault("a damaged file", f"killed {where}: {error}") from error
        for name, model in candidates.items():
            state = model.state_dict()
            if tensors.keys() == state.keys() and all(
                torch.equal(tensors[key], state[key]) for key in tensors
            ):
                return name
        raise Fault("neither the old file nor the new one", f"killed {where}")


def _kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


KILLS = [Kills()]
