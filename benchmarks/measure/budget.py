"""The time that a run may take."""

from __future__ import annotations

import time


class Budget:
    """Seconds left of a run that must end in time.

    Args:
        seconds: None for no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.start = seconds, time.monotonic()
        self.left_out: list[dict[str, str]] = []

    def allows(self, what: str, needs: float) -> bool:
        """Whether a step that needs about `needs` seconds still fits; notes it if not."""
        spent = time.monotonic() - self.start
        if self.seconds is None or spent + needs <= self.seconds:
            return True
        self.left_out.append(
            {"left out": what, "because": f"{spent:.0f} s of {self.seconds:.0f} s were spent"}
        )
        return False
