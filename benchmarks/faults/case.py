"""What a campaign is made of: kinds of cases, each reproducible by its name and an index."""

from __future__ import annotations

import random
import traceback
from dataclasses import dataclass

import torch


class Fault(Exception):
    """Something that must not happen, and did.

    Args:
        kind: a few words, the same for all faults alike; the report counts by them.
        detail: what was seen in this very case.
    """

    def __init__(self, kind: str, detail: object = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail != "" else kind)
        self.kind = kind
        self.detail = str(detail)


class NotHere(Exception):
    """A kind that this machine cannot try, and why."""


class Kind:
    """One kind of cases.

    Attributes:
        name: for the command line; the random numbers of a case come from it and the index.
        about: a sentence for the report.
        short, long: cases in the short and in the long mode.
        unit: calls of the package in one case, for the report.
        sanitizer: whether cases run on the kernel built with AddressSanitizer.
        patience: seconds without an answer after which a case counts as hanging.
    """

    name: str
    about: str
    short: int
    long: int
    unit: int = 1
    sanitizer: bool = False
    patience: float = 120.0

    def count(self, long: bool) -> int:
        """Cases in a mode."""
        return self.long if long else self.short

    def run(self, index: int) -> str:
        """Tries one case.

        Returns:
            A word for what became of it (`"refused"`, `"computed"`, ...), for the report.

        Raises:
            Fault: it ended as it must not.
        """
        raise NotImplementedError

    def random(self, index: int) -> random.Random:
        """The source of all choices in a case; seeds torch as well."""
        source = random.Random(f"{self.name}:{index}")
        # (torch.manual_seed also notes, for each call, what to do once CUDA is there: a list that grows)
        torch.default_generator.manual_seed(source.getrandbits(60))
        return source


@dataclass(frozen=True)
class Outcome:
    """What became of one case: a word, or a fault."""

    kind: str
    index: int
    word: str = ""
    fault: str = ""
    detail: str = ""

    @property
    def case(self) -> str:
        return f"{self.kind}:{self.index}"


def attempt(kind: Kind, index: int) -> Outcome:
    """Runs a case; an error that the case did not foresee is a fault too."""
    try:
        return Outcome(kind.name, index, kind.run(index))
    except Fault as fault:
        return Outcome(kind.name, index, "fault", fault.kind, fault.detail)
    except Exception as error:
        text = "".join(traceback.format_exception(error)[-3:])
        name = type(error).__name__
        return Outcome(kind.name, index, "fault", f"an error nobody expected ({name})", text)
