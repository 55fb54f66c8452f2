"""The command line: `python -m torchao_superblock inspect | convert | bench`.

Exit codes: 0 done; 1 nothing to do (no layer to convert or to measure); 2 a mistake in the call or in the files, which
one line on stderr names, and nothing was changed; 130 interrupted.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from torchao_superblock.bsr import BSRConv1x1, BSRLinear, save_bsr, swap_to_bsr, swap_to_dense
from torchao_superblock.bsr.attention import projections
from torchao_superblock.bsr.swap import SwapEntry
from torchao_superblock.common.blocks import padded_shape
from torchao_superblock.model_file import ModelFile, read_model, write_dense, write_folder
from torchao_superblock.ops import ACTIVATIONS
from torchao_superblock.ops.break_even import break_even

PROGRAM = "torchao_superblock"
NOTHING_TO_DO = 1
MISTAKE = 2
INTERRUPTED = 130

_GUESSES = (
    "types are read off names and shapes: each 2-D weight counts as a linear layer, embeddings too "
    "(--exclude leaves out)"
)


@dataclass
class Layer:
    """One row of a table.

    Attributes:
        name: the layer's FQN.
        shape: `(out_features, in_features)` of the dense layer.
        blocksize: `(rows, cols)`, or None where there is no block of zeros.
        sparsity: fraction of blocks that are zero or not stored; None where it was not looked at.
        is_bsr: whether it is stored as blocks, or would be.
        reason: a sentence.
        bytes: of its weight as a dense one.
        bytes_saved: by storing blocks, indices counted.
    """

    name: str
    shape: tuple[int, int]
    blocksize: tuple[int, int] | None
    sparsity: float | None
    is_bsr: bool
    reason: str
    bytes: int
    bytes_saved: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit code.
    """
    arguments = _parser().parse_args(argv)
    try:
        if not arguments.json:
            _check_rich()
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, TypeError, ImportError, torch.OutOfMemoryError) as error:
        _complain(_words(error))
        return MISTAKE


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {os.fspath(error.filename)!r}"
    return str(error) or type(error).__name__


def _complain(message: str) -> None:
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _complain(f"{message} (see {self.prog} --help)")
        sys.exit(MISTAKE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"python -m {PROGRAM}",
        description="Look at, convert and time models with block-sparse weights.",
        epilog="Exit codes: 0 done, 1 nothing to do, 2 a mistake in the call or in the files (nothing was changed).",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], words: str) -> _Parser:
        sub = commands.add_parser(name, help=words, description=words)
        sub.set_defaults(run=run)
        sub.add_argument(
            "file",
            metavar="IN" if name == "convert" else "FILE",
            type=Path,
            help="a file of save_bsr, a safetensors file, a torch checkpoint or a transformers folder",
        )
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        sub.add_argument("--key", help="where in a checkpoint the state dict lies, such as model")
        sub.add_argument(
            "--blocksize",
            type=_blocksize,
            help="64 or 64x32 (out x in) for all layers; by default each one's is read off its zeros",
        )
        sub.add_argument(
            "--pad",
            action="store_true",
            help="pad the last blocks of layers whose shape is not a multiple of the block size",
        )
        sub.add_argument(
            "--exclude",
            metavar="GLOB",
            action="append",
            default=[],
            help="leave these layers dense, for example '*embed*'; may be repeated",
        )
        return sub

    for sub in (
        command(
            "inspect", _inspect, "Show the layers, and what a swap to BSR would do with them here."
        ),
        convert := command(
            "convert", _convert, "Make BSR of a dense block-sparse model, or dense of BSR."
        ),
        bench := command(
            "bench",
            _bench,
            "Time each layer with blocks of zeros on this machine, dense and as BSR.",
        ),
    ):
        sub.add_argument(
            "--device",
            default="cuda" if torch.cuda.is_available() else "cpu",
            type=_device,
            help="whose break-even points decide, and where times are taken: cpu or cuda",
        )
    for sub in (convert, commands.choices["inspect"]):
        sub.add_argument(
            "--min-sparsity",
            type=_fraction,
            help="convert layers with at least this fraction of zero blocks; by default those that get faster",
        )
    convert.add_argument(
        "output", metavar="OUT", type=Path, help="*.safetensors, or a folder for a folder"
    )
    convert.add_argument("--force", action="store_true", help="replace OUT if it exists")
    bench.add_argument("--tokens", type=_count, default=256, help="rows of the input (default 256)")
    bench.add_argument(
        "--seconds", type=_seconds, default=1.0, help="time to spend on each layer (default 1)"
    )
    return parser


def _blocksize(text: str) -> int | tuple[int, int]:
    try:
        sizes = [int(part) for part in text.lower().split("x")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no block size such as 64 or 64x32")
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def _fraction(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 <= float(text) <= 1.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no fraction from 0 to 1")


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device here ({str(error).partition(chr(10))[0]})"
        ) from None
    return device


# ---------------------------------------------------------------------------------------------------------------------
# Commands.


def _inspect(arguments: argparse.Namespace) -> int:
    read = _read(arguments)
    layers = _layers(read, arguments, arguments.min_sparsity)
    saved = sum(layer.bytes_saved for layer in layers)
    swapped = sum(layer.is_bsr for layer in layers)
    verb = "are stored as BSR" if read.is_bsr else "would be swapped"
    if arguments.json:
        _print_json(
            file=str(arguments.file),
            kind=read.kind,
            device=str(arguments.device),
            swapped=swapped,
            bytes_saved=saved,
            layers=[asdict(layer) for layer in layers],
        )
        return 0
    _print_layers(f"{arguments.file} ({read.kind})", layers)
    _print(f"{swapped} of {len(layers)} linear layers {verb}, which saves {_size(saved)}")
    if read.guesses:
        _print(_GUESSES)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    source, target = arguments.file, arguments.output
    _check_output(source, target, arguments.force)
    read = _read(arguments)
    layers = _layers(read, arguments, arguments.min_sparsity)
    if not any(layer.is_bsr for layer in layers):
        _complain(
            f"nothing to convert: no layer of {str(source)!r} would be swapped (inspect says why; --min-sparsity "
            "decides yourself)"
        )
        return NOTHING_TO_DO
    model = read.model.to("cpu")
    if read.is_bsr:
        swap_to_dense(model)
    if read.is_folder:
        write_folder(model, source, target, to_bsr=not read.is_bsr)
    else:
        (write_dense if read.is_bsr else save_bsr)(model, target)
    written = [layer for layer in layers if layer.is_bsr]
    result = "dense" if read.is_bsr else "BSR"
    saved = sum(layer.bytes_saved for layer in written)
    if arguments.json:
        _print_json(
            file=str(source),
            output=str(target),
            to=result.lower(),
            bytes_saved=-saved if read.is_bsr else saved,
            layers=[layer.name for layer in written],
        )
        return 0
    change = f"{_size(saved)} {'more' if read.is_bsr else 'less'}"
    _print(f"{target}: {len(written)} of {len(layers)} linear layers are {result} now, {change}")
    return 0


def _check_output(source: Path, target: Path, force: bool) -> None:
    """Refuse before any work what could not be written, or must not be."""
    if not source.exists():
        raise ValueError(f"no such file: {str(source)!r}")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"the folder of {str(target)!r} does not exist")
    if target.exists() and not force:
        raise ValueError(f"{str(target)!r} exists; --force replaces it")
    if source.is_dir():
        if target.is_symlink() or (target.exists() and not (target / "config.json").is_file()):
            raise ValueError(
                f"{str(target)!r} is no transformers folder and is not replaced by one"
            )
    elif target.is_dir():
        raise ValueError(f"{str(target)!r} is a folder; name the file in it")
    elif target.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{str(target)!r}: what is written is a safetensors file; name it so")
    if not os.access(target.absolute().parent, os.W_OK):
        raise ValueError(f"the folder of {str(target)!r} is not writable")


def _bench(arguments: argparse.Namespace) -> int:
    read = _read(arguments)
    # Whatever has a block of zeros.
    layers = [layer for layer in _layers(read, arguments, min_sparsity=1e-9) if layer.is_bsr]
    if not layers:
        _complain(f"nothing to measure: no layer of {str(arguments.file)!r} has a block of zeros")
        return NOTHING_TO_DO
    rows = []
    with _progress("measuring", len(layers)) as advance:
        for layer in layers:
            module = read.model.get_submodule(layer.name)
            rows.append((layer, *_times(module, arguments.tokens, arguments.seconds)))
            advance()
    dense, ours = (sum(row[column] for row in rows) for column in (1, 2))
    if arguments.json:
        _print_json(
            file=str(arguments.file),
            device=_device_name(arguments.device),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            tokens=arguments.tokens,
            dense_ms=dense,
            bsr_ms=ours,
            layers=[
                {
                    "name": layer.name,
                    "shape": layer.shape,
                    "blocksize": layer.blocksize,
                    "sparsity": layer.sparsity,
                    "dtype": str(read.model.get_submodule(layer.name).values.dtype),
                    "dense_ms": dense_ms,
                    "bsr_ms": bsr_ms,
                }
                for layer, dense_ms, bsr_ms in rows
            ],
        )
        return 0
    _print(f"{arguments.file}: {arguments.tokens} tokens on {_device_name(arguments.device)}")
    table = _table("layer", "shape", "block", "sparsity", "dense ms", "BSR ms", "speedup")
    for layer, dense_ms, bsr_ms in rows:
        table.add_row(
            *_cells(layer), f"{dense_ms:.3f}", f"{bsr_ms:.3f}", f"{dense_ms / bsr_ms:.2f}x"
        )
    if len(rows) > 1:
        table.add_row("all", "", "", "", f"{dense:.3f}", f"{ours:.3f}", f"{dense / ours:.2f}x")
    _print(table)
    return 0


def _times(layer: BSRLinear, tokens: int, seconds: float) -> tuple[float, float]:
    """Milliseconds of the dense layer and of the block-sparse one: medians of interleaved rounds."""
    dense = layer.dense_module(layer.matrix_of(layer.to_dense()), layer.bias)
    activation = ACTIVATIONS[layer.activation]
    x = torch.randn(tokens, layer.in_features).to(layer.values)
    if isinstance(layer, BSRConv1x1):
        x = x.t()[None, :, :, None]  # channels-last
    rounds = 5
    with torch.inference_mode():
        calls = (lambda: activation(dense(x))), (lambda: layer(x))
        samples = [
            [_milliseconds(call, x.device, seconds / (2 * rounds)) for call in calls]
            for _ in range(rounds)
        ]
    dense_ms, bsr_ms = (statistics.median(column) for column in zip(*samples, strict=True))
    return dense_ms, bsr_ms


def _milliseconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Of one call, the mean of as many as fill half of the time at least, after some to warm up."""

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    count = 1
    while (elapsed := run(count)) < seconds / 2:
        count *= 2
    return elapsed / count * 1e3


# ---------------------------------------------------------------------------------------------------------------------
# What a file holds.


def _read(arguments: argparse.Namespace) -> ModelFile:
    with _progress(f"reading {arguments.file}", None):
        read = read_model(arguments.file, arguments.key)
    options = ("blocksize", "min_sparsity", "pad", "exclude")
    given = [f"--{name.replace('_', '-')}" for name in options if getattr(arguments, name, None)]
    if read.is_bsr and given:
        raise ValueError(
            f"{str(arguments.file)!r} is BSR already: {', '.join(given)} cannot change it"
        )
    return read


def _layers(
    read: ModelFile, arguments: argparse.Namespace, min_sparsity: float | None
) -> list[Layer]:
    """Swap the model, or look at one that is; a row for each linear layer, in the order of the model."""
    model = read.model.to(arguments.device)
    before: dict[str, nn.Module] = {}
    places: dict[
        str, str
    ] = {}  # of projections that an attention holds itself: what they are once they are swapped
    for fqn, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for projection in projections(module, fqn):
                before[projection.fqn] = projection.linear
                places[projection.fqn] = projection.values_fqn.removesuffix(".values")
        elif isinstance(module, nn.Linear | BSRLinear):
            before.setdefault(fqn, module)
    stored = [
        _stored(fqn, module) for fqn, module in before.items() if isinstance(module, BSRLinear)
    ]
    if read.is_bsr:
        dense = [
            Layer(
                fqn,
                tuple(module.weight.shape),
                None,
                None,
                False,
                "stored dense",
                _bytes(module),
                0,
            )
            for fqn, module in before.items()
            if isinstance(module, nn.Linear)
        ]
        return _sorted([*stored, *dense], before)
    with _progress("looking for blocks of zeros", len(before)) as advance:

        def is_meant(module: nn.Module, fqn: str) -> bool:
            advance()
            return not any(fnmatch(fqn, pattern) for pattern in arguments.exclude)

        report = swap_to_bsr(
            model,
            arguments.blocksize,
            min_sparsity=min_sparsity,
            filter_fn=is_meant,
            pad=arguments.pad,
        )
    entries = {entry.fqn: entry for entry in [*report.swapped, *report.skipped]}
    swapped = {entry.fqn for entry in report.swapped}
    now = {fqn: model.get_submodule(places.get(fqn, fqn)) for fqn in before.keys() & swapped}
    return [_judged(entries[fqn], module, now.get(fqn, module)) for fqn, module in before.items()]


def _sorted(layers: list[Layer], order: dict[str, nn.Module]) -> list[Layer]:
    place = {fqn: position for position, fqn in enumerate(order)}
    return sorted(layers, key=lambda layer: place[layer.name])


def _judged(entry: SwapEntry, old: nn.Module, new: nn.Module) -> Layer:
    swapped = isinstance(new, BSRLinear)
    blocksize = entry.blocksize if entry.sparsity else None
    saved = _bytes(old) - _bytes(new) if swapped else 0
    reason = entry.reason + (_padding(new) if swapped else "")
    return Layer(
        entry.fqn, entry.shape, blocksize, entry.sparsity, swapped, reason, _bytes(old), saved
    )


def _padding(layer: BSRLinear) -> str:
    padded = padded_shape((layer.out_features, layer.in_features), layer.blocksize)
    return "" if padded is None else "; padded to {}x{}".format(*padded)


def _stored(fqn: str, layer: BSRLinear) -> Layer:
    N, K = layer.dense_shape
    nbytes = N * K * layer.values.element_size()
    reason = "stored as BSR"
    needed = break_even(layer.values.device.type, layer.blocksize, layer.values.dtype)
    if layer.sparsity < needed.sparsity:
        guess = "" if needed.measured else " (a guess, nobody measured)"
        reason += f", though on {needed.where} blocks of this size break even at {needed.sparsity:.1%}{guess}"
    if layer.is_narrowed:
        reason += f"; narrowed to {layer.out_features}x{layer.in_features}"
    reason += _padding(layer)
    if layer.activation != "none":
        reason += f"; applies {layer.activation}"
    return Layer(
        fqn, (N, K), layer.blocksize, layer.sparsity, True, reason, nbytes, nbytes - _bytes(layer)
    )


def _bytes(layer: nn.Module) -> int:
    """Bytes that a file needs for the weight."""
    if isinstance(layer, BSRLinear):
        return sum(
            tensor.nbytes for tensor in (layer.values, layer.crow_indices, layer.col_indices)
        )
    return layer.weight.numel() * layer.weight.element_size()


# ---------------------------------------------------------------------------------------------------------------------
# Output.


def _check_rich() -> None:
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"tables need rich: pip install '{PROGRAM}[cli]'; or print --json"
        ) from error


def _table(*headings: str) -> Any:
    """A table of layers: names to the left, numbers to the right."""
    from rich.table import Table

    table = Table()
    for heading in headings:
        table.add_column(
            heading, justify="left" if heading == headings[0] else "right", overflow="fold"
        )
    return table


def _print(what: Any) -> None:
    from rich.console import Console

    # A file or a pipe has no width: nothing is cut off there.
    Console(width=None if sys.stdout.isatty() else 250, highlight=False).print(what, markup=False)


def _print_json(**fields: Any) -> None:
    print(json.dumps(fields, indent=2))


def _print_layers(title: str, layers: list[Layer]) -> None:
    _print(title)
    table = _table("layer", "shape", "block", "sparsity", "saved")
    table.add_column("a swap here", overflow="fold")
    for layer in layers:
        saved = _size(layer.bytes_saved) if layer.is_bsr else "-"
        verdict = layer.reason
        if not layer.reason.startswith("stored"):
            verdict = f"{'yes' if layer.is_bsr else 'no'}: {layer.reason}"
        table.add_row(*_cells(layer), saved, verdict)
    _print(table)


def _cells(layer: Layer) -> tuple[str, str, str, str]:
    return (
        layer.name,
        "x".join(map(str, layer.shape)),
        "x".join(map(str, layer.blocksize)) if layer.blocksize else "-",
        f"{layer.sparsity:.1%}" if layer.sparsity is not None else "-",
    )


def _size(nbytes: int) -> str:
    size, units = float(nbytes), ["B", "kB", "MB", "GB"]
    while abs(size) >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.{0 if units[0] == 'B' else 1}f} {units[0]}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({torch.get_num_threads()} threads)"


@contextlib.contextmanager
def _progress(words: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A bar on stderr while the block runs, where a person watches; yields what moves it on by one."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:  # with --json all works without it
        yield lambda: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(words, total=total)
        yield lambda: progress.advance(task)
