"""Tries to break the package, and says how often it was tried and what broke.

    python benchmarks/reliability.py                         # short, about a minute on two cores
    python benchmarks/reliability.py --long                  # the full campaign; writes docs/reliability.md
    python benchmarks/reliability.py --kinds files kills     # some of it ("exception" means all "exception/...")
    python benchmarks/reliability.py --case files:1234       # one case again, in this process

Kinds of cases
    files, state_dicts   what is loaded has bits, bytes, entries, types or facts changed
    op                   hostile arguments, on the kernel built with AddressSanitizer
    gradients            random ones against dense float64
    exception            MemoryError or KeyboardInterrupt at any line of a call that changes something
    kills                kill -9 while saving
    threads, forks       several users of one model at once
    soak                 memory over many calls

Every case is made from the name of its kind and an index, so a fault can be repeated by `--case`. Cases run in worker
processes: a crash or a hang is a fault too. The exit status is 1 if there was any fault, or anything was not tried.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` when run as a file

from benchmarks.faults import sanitizer
from benchmarks.faults.case import Kind, Outcome, attempt

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"


def choose(known: Mapping[str, Kind], names: list[str] | None) -> list[Kind]:
    """The kinds of these names, or whose name starts with one of them and a slash; all for None.

    Raises:
        SystemExit: there is no such kind.
    """
    if names is None:
        return list(known.values())
    chosen = {}
    for name in names:
        found = {n: k for n, k in known.items() if n == name or n.startswith(f"{name}/")}
        if not found:
            raise SystemExit(f"no kind {name!r}; there are {', '.join(known)}")
        chosen |= found
    return list(chosen.values())


def pieces_of(
    kinds: list[Kind], long: bool, jobs: int, count: int | None
) -> list[tuple[Kind, range]]:
    """All cases of the kinds; long ones in pieces, one for each job."""
    pieces = []
    for kind in kinds:
        total = kind.count(long) if count is None else count
        parts = jobs if total > 1000 else 1
        size = -(-total // parts)
        pieces += [
            (kind, range(start, min(start + size, total))) for start in range(0, total, size)
        ]
    return pieces


def tables(kinds: list[Kind], results: Mapping[str, object]) -> str:
    """What was tried, and what was found, as Markdown."""
    from benchmarks.report.table import markdown_table

    tried, found = [], []
    for kind in kinds:
        result = results[kind.name]
        words = collections.Counter(o.word for o in result.outcomes if not o.fault)
        calls = f" x {kind.unit:,} calls" if kind.unit > 1 else ""
        ended = [f"{count:,} {word}" for word, count in words.most_common(4)]
        tried.append(
            {
                "kind": kind.name,
                "what is tried, and what must hold": kind.about,
                "cases": f"{len(result.outcomes):,}{calls}",
                "faults": len(result.faults),
                "the others": ", ".join(ended) or "-",
            }
        )
        groups: dict[str, list[Outcome]] = {}
        for outcome in result.faults:
            groups.setdefault(outcome.fault, []).append(outcome)
        for fault, outcomes in sorted(groups.items(), key=lambda item: -len(item[1])):
            detail = " ".join(outcomes[0].detail.split())[:200]
            row = {"case": outcomes[0].case, "fault": fault, "times": len(outcomes)}
            found.append({**row, "seen in that case": detail})
        if result.missing:
            left = result.planned - len(result.outcomes)
            row = {"case": kind.name, "fault": f"{left:,} cases not tried", "times": None}
            found.append({**row, "seen in that case": result.missing})
    text = markdown_table(tried)
    return text + ("\n\n## Faults\n\n" + markdown_table(found) if found else "")


def page(kinds: list[Kind], results: Mapping[str, object], command: str) -> str:
    """The report: what was tried, on what, and what was found."""
    from benchmarks.report.facts import environment
    from benchmarks.report.table import markdown_table

    cases = sum(len(result.outcomes) for result in results.values())
    faults = sum(len(result.faults) for result in results.values())
    facts = {**environment("cpu"), "command": command}
    return (
        "\n\n".join(
            [
                "# Reliability",
                f"{cases:,} attempts to break the package: **{faults:,} faults**. Written by "
                "[benchmarks/reliability.py](../benchmarks/reliability.py); "
                "a case is repeated with `--case KIND:INDEX`.",
                markdown_table([{"": name, "this run": value} for name, value in facts.items()]),
                "## What was tried",
                tables(kinds, results),
            ]
        )
        + "\n"
    )


def repeat(case: str) -> int:
    """Runs one case in this process and prints what becomes of it."""
    from benchmarks.faults.campaign import kinds

    name, _, index = case.rpartition(":")
    if sanitizer.VARIABLE not in os.environ:
        known = kinds()
        if name not in known or not index.isdecimal():
            raise SystemExit(f"--case takes KIND:INDEX, with one of {', '.join(known)}")
        if known[name].sanitizer:
            variables = sanitizer.environment(sanitizer.build(builds()))
            program = [sys.executable, str(Path(__file__).resolve()), "--case", case]
            os.execve(sys.executable, program, {**os.environ, **variables})
    sanitizer.use()
    import torch

    torch.set_num_threads(1)
    outcome = attempt(kinds()[name], int(index))
    print(f"{outcome.case}: {outcome.fault or outcome.word}\n{outcome.detail}".strip())
    return 1 if outcome.fault else 0


def builds() -> Path:
    """Where sanitized kernels are kept from one run to the next."""
    return Path(tempfile.gettempdir()) / f"superblock-sanitizer-{os.getuid()}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the campaign; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="the full campaign; writes the page")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="default: all")
    parser.add_argument("--count", type=int, help="cases of each kind (default: by the mode)")
    parser.add_argument("--case", metavar="KIND:INDEX", help="repeat one case")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="workers (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help=f"the page (default, with --long: {PAGE})")
    options = parser.parse_args(arguments)
    if options.case:
        return repeat(options.case)

    from benchmarks.faults.campaign import kinds, run
    from benchmarks.report.progress import Progress

    chosen = choose(kinds(), options.kinds)
    pieces = pieces_of(chosen, options.long, options.jobs, options.count)
    progress = Progress(sum(len(indices) for _, indices in pieces), "reliability")
    results = run(
        pieces, jobs=options.jobs, builds=builds(), tell=lambda outcome: progress.step(outcome.case)
    )
    progress.close()
    print(tables(chosen, results))
    output = options.output or (PAGE if options.long else None)
    if output is not None:
        command = " ".join(["python benchmarks/reliability.py", *(arguments or sys.argv[1:])])
        output.write_text(page(chosen, results, command), encoding="utf-8")
        print(f"\nwritten to {output}")
    bad = [name for name, result in results.items() if result.faults or result.missing]
    if bad:
        print(f"\nfaults, or cases not tried, in {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
