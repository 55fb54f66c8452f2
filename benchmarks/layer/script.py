"""A script about one linear layer: its sections one after another, and what went wrong in them."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.layer.runs import Context, Failures
from benchmarks.measure.roofline import measure_roofline
from benchmarks.report.files import Report
from benchmarks.report.options import add_common_arguments, pick_device

LARGEST_ERROR = 1e-2
"""A relative error above this is no rounding, in any dtype: the time of a wrong result says nothing."""

Sections = Mapping[str, Mapping[str, Callable[[Context], None]]]
"""Device type -> name -> section."""


def is_wrong(record: Mapping[str, Any]) -> bool:
    """Whether any error in a record is too large to be rounding, or no number."""
    errors = [value for key, value in record.items() if "error" in key.split(" ")]
    return any(isinstance(e, float) and not e <= LARGEST_ERROR for e in errors)


def list_wrong(report: Report) -> int:
    """Lists results that are wrong.

    Returns:
        How many there are.
    """
    wrong = [record for record in report.records if is_wrong(record)]
    if wrong:
        report.table("Wrong results", wrong, note="Their times say nothing.")
    return len(wrong)


def run_script(
    name: str,
    title: str,
    description: str | None,
    sections: Sections,
    argv: Sequence[str] | None = None,
) -> Path:
    """Runs the sections that the command line asks for and writes the report.

    Args:
        name: of the script; result files are named by it.
        title: of the report.
        description: for `--help`.
        sections: of each type of device.
        argv: command line; that of the process by default.

    Returns:
        Path of the Markdown file.

    Raises:
        SystemExit: if a section failed or a result is wrong; the report is written all the same.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    every = sorted({section for of_device in sections.values() for section in of_device})
    parser.add_argument(
        "--sections", nargs="+", choices=every, metavar="NAME", help="default: all of the device"
    )
    arguments = parser.parse_args(argv)
    device = pick_device(arguments)
    if device.type not in sections:
        parser.error(
            f"{name} has nothing to measure on {device.type}: pass --device {' or '.join(sections)}"
        )
    available = sections[device.type]
    chosen = arguments.sections or list(available)
    unknown = [section for section in chosen if section not in available]
    if unknown:
        parser.error(
            f"{device.type} has no section {', '.join(unknown)}; it has {', '.join(available)}"
        )
    import torchao_superblock.ops  # noqa: F401  registers the op

    report = Report(name, title, device, directory=arguments.output_dir, label=arguments.label)
    roofline = measure_roofline(device, quick=arguments.quick)
    for what, value in roofline.describe().items():
        report.fact(what, value)
    pictures = not arguments.no_pictures
    context = Context(device, report, roofline, Failures(), arguments.quick, pictures)
    broken = []
    for section in chosen:
        try:
            available[section](context)
        except Exception as error:  # the other sections are still worth having
            traceback.print_exc()
            report.text(f"**Section {section} failed:** {type(error).__name__}: {error}")
            broken.append(section)
    context.failures.report(report)
    n_wrong = list_wrong(report)
    path = report.write()
    print(f"\nwritten: {path}")
    if broken:
        raise SystemExit(f"failed sections: {', '.join(broken)}")
    if n_wrong:
        raise SystemExit(f"{n_wrong} wrong results, listed in {path}")
    return path
