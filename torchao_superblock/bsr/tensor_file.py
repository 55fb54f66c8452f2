"""The safetensors format: eight bytes with the length of a JSON header, the header, then the bytes of the tensors.

https://github.com/huggingface/safetensors#format. What it is written and read with here gives up memory mapping, and
gains: a loaded tensor owns its memory, so that changing or truncating the file later cannot change or crash the model;
equal content gives equal bytes; one tensor at a time is in memory twice at most; any file name will do.
"""

import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # as the format has it
_NO_CHECKSUM = "0" * 8


class Entry(NamedTuple):
    """Where one tensor stands in a file."""

    dtype: str
    shape: list[int]
    begin: int
    end: int


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    describe: Callable[[dict[str, str]], dict[str, str]],
) -> None:
    """Write a safetensors file.

    Args:
        file: open for writing, at its start.
        tensors: name -> a dense tensor on any device; they are copied to the CPU one at a time.
        describe: makes the metadata from the checksum of each tensor. It is called twice, at first with checksums that
            are not known yet, and the lengths must be the same.
    """
    # The widest first, so that each begins at a multiple of its element size.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    entries, end = {}, 0
    for key in order:
        tensor, begin = tensors[key], end
        end += tensor.numel() * tensor.element_size()
        entries[key] = Entry(_NAMES[tensor.dtype], list(tensor.shape), begin, end)
    checksums = dict.fromkeys(entries, _NO_CHECKSUM)
    file.write(_header(entries, describe(checksums)))
    for key, entry in entries.items():
        content = _bytes(tensors[key])
        checksums[key] = checksum(key, entry, content)
        file.write(content)
    file.seek(0)
    file.write(_header(entries, describe(checksums)))


def read_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata of a safetensors file and where its tensors stand, counted from the start of the file.

    Raises:
        ValueError: it breaks the format; the message says how.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(_MAX_HEADER, size - 8):
        raise ValueError("its header is longer than the file or than the format allows")
    try:
        header = json.loads(file.read(length).decode("utf-8"))
        metadata = header.pop("__metadata__", {})
        entries = {}
        for key, fields in header.items():
            begin, end = fields["data_offsets"]
            entries[key] = Entry(fields["dtype"], fields["shape"], begin, end)
        numbers = [n for e in entries.values() for n in (*e.shape, e.begin, e.end)]
        strings = [s for pair in metadata.items() for s in pair] + [
            e.dtype for e in entries.values()
        ]
        if (
            not all(type(n) is int and 0 <= n < 2**63 for n in numbers)
            or not all(type(s) is str for s in strings)
            or not all(type(e.shape) is list for e in entries.values())
        ):
            raise TypeError("a field has another type")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__}: {error})") from error
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.dtype not in DTYPES:
            raise ValueError(f"{key!r} has the unknown dtype {entry.dtype}")
        nbytes = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if entry.begin != position or entry.end != position + nbytes:
            raise ValueError(
                f"{key!r} of shape {entry.shape} stands at bytes {entry.begin} to {entry.end}, not at {position} "
                f"to {position + nbytes}"
            )
        position = entry.end
    start = 8 + length
    if start + position != size:
        raise ValueError(f"it has {size} bytes, its header says {start + position}")
    return metadata, {
        key: entry._replace(begin=start + entry.begin, end=start + entry.end)
        for key, entry in entries.items()
    }


def read_tensor(file: BinaryIO, key: str, entry: Entry, expected: str | None) -> Tensor:
    """One tensor, in memory of its own.

    Args:
        file: open for reading.
        key: its name.
        entry: where it stands.
        expected: its checksum, or None where the file has none.

    Raises:
        ValueError: the content does not fit.
    """
    content = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
    view = memoryview(content.numpy())
    file.seek(entry.begin)
    if file.readinto(view) != len(view):
        raise ValueError(f"it ends within {key!r}; something truncated it meanwhile")
    if expected is not None and checksum(key, entry, view) != expected:
        raise ValueError(f"the content of {key!r} does not have the checksum of what was saved")
    dtype = DTYPES[entry.dtype]
    if dtype == torch.bool and len(view) and content.max() > 1:
        raise ValueError(f"{key!r} is bool and holds bytes other than 0 and 1")
    try:
        return content.view(dtype).reshape(entry.shape)
    except RuntimeError as error:  # an empty tensor of a shape that overflows
        raise ValueError(f"{key!r} cannot have shape {entry.shape}") from error


def checksum(key: str, entry: Entry, content: memoryview) -> str:
    """CRC-32 over a tensor's name, dtype, shape and bytes, as eight hexadecimal digits."""
    start = zlib.crc32(json.dumps([key, entry.dtype, entry.shape]).encode())
    return f"{zlib.crc32(content, start):08x}"


def _header(entries: dict[str, Entry], metadata: dict[str, str]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": metadata}
    for key, entry in entries.items():
        fields[key] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for it
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    if sys.byteorder != "little":
        raise NotImplementedError("safetensors files are little-endian, this machine is not")
    flat = tensor.detach().cpu().resolve_neg().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())
