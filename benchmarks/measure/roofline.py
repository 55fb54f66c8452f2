"""What a device can do at best, measured in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.measure.interleaved import measure
from benchmarks.measure.precision import precision


@dataclass(frozen=True)
class Roofline:
    """What this device can do at best, measured in this run.

    Attributes:
        bandwidth: bytes per second of a large copy, bytes read plus bytes written.
        rates: floating-point operations per second of a large dense product, by mode
            (`"bfloat16"`, `"float16"`, `"tf32"`, `"float32"`).
    """

    bandwidth: float
    rates: dict[str, float] = field(default_factory=dict)

    def rate(self, mode: str) -> float:
        """Operations per second for `mode`; float32 may also be three TF32 products."""
        if mode == "float32" and "tf32" in self.rates:
            return max(self.rates["float32"], self.rates["tf32"] / 3)
        return self.rates[mode]

    def floor(self, nbytes: float, operations: float, mode: str) -> float:
        """Seconds that moving `nbytes` and doing `operations` takes at the very least."""
        return max(nbytes / self.bandwidth, operations / self.rate(mode))

    def describe(self) -> dict[str, str]:
        """The measured ceilings as text, by name."""
        rows = {"copy bandwidth (read + write)": f"{self.bandwidth / 1e9:.0f} GB/s"}
        for mode, rate in self.rates.items():
            unit = f"{rate / 1e12:.0f} TFLOP/s" if rate > 5e12 else f"{rate / 1e9:.0f} GFLOP/s"
            rows[f"dense {mode} product"] = unit
        return rows


def measure_roofline(
    device: str | torch.device, modes: Sequence[str] | None = None, *, quick: bool = False
) -> Roofline:
    """Measures copy bandwidth and the rate of a large dense product in each mode.

    Args:
        device: where.
        modes: some of `"bfloat16"`, `"float16"`, `"tf32"`, `"float32"`; all that make sense
            by default.
        quick: smaller operands.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    if modes is None:
        modes = ("bfloat16", "float16", "tf32", "float32") if cuda else ("float32", "bfloat16")
    nbytes = 2**30 if cuda else 2**26 if quick else 2**28
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure({"copy": lambda s=source, t=target: t.copy_(s)}, device, seconds=0.3).timing(
        "copy"
    )
    del source, target
    rates: dict[str, float] = {}
    for mode in modes:
        size = (4096 if mode == "float32" else 8192) if cuda else 512 if quick else 1536
        with precision(mode) as dtype:
            a = torch.randn(size, size, device=device).to(dtype)
            b = torch.randn(size, size, device=device).to(dtype)
            measured = measure(
                {"product": lambda a=a, b=b: torch.nn.functional.linear(a, b)}, device, seconds=0.3
            )
        timing = measured.timing("product")
        if timing is not None:
            rates[mode] = 2 * size**3 / (timing.median if cuda else timing.minimum)
    assert copy is not None
    return Roofline(2 * nbytes / (copy.median if cuda else copy.minimum), rates)
