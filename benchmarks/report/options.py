"""The options that every script has."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.report.files import RESULTS


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--device --quick --output-dir --label --threads --no-pictures`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="fewer cells and rounds")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--label", help="appended to the file names")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--no-pictures", action="store_true", help="tables only")


def pick_device(arguments: argparse.Namespace) -> torch.device:
    """The device asked for, after setting the number of threads asked for.

    Raises:
        SystemExit: if CUDA was asked for and there is none.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here")
    return torch.device(arguments.device)
