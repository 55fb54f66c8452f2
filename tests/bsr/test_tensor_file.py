import json

import pytest
import torch
from safetensors.torch import load, save

from torchao_superblock.bsr import tensor_file
from torchao_superblock.bsr.tensor_file import DTYPES

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "b.values": torch.arange(12.0).view(3, 4),
    "a.half": torch.arange(5).to(torch.bfloat16),
    "empty": torch.zeros(0, 7, dtype=torch.int64),
    "single": torch.tensor(2.5, dtype=torch.float64),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def write(path, tensors):
    with open(path, "wb") as file:
        tensor_file.write_tensors(file, tensors, lambda checksums: {"sums": json.dumps(checksums)})


def read(path):
    with open(path, "rb") as file:
        metadata, entries = tensor_file.read_header(file)
        sums = json.loads(metadata.get("sums", "{}"))
        return {
            key: tensor_file.read_tensor(file, key, entry, sums.get(key))
            for key, entry in entries.items()
        }


def same(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[key].dtype, other[key].shape)
        assert torch.equal(tensor, other[key])


def test_safetensors_reads_what_is_written_and_writes_what_is_read(path):
    write(path, TENSORS)
    same(read(path), TENSORS)
    same(load(path.read_bytes()), TENSORS)
    path.write_bytes(save(TENSORS, {"a": "b"}))
    same(read(path), TENSORS)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype(path, dtype):
    tensors = {"x": torch.tensor([0, 1, 1, 0, 1]).to(dtype)}
    write(path, tensors)
    for loaded in (read(path), load(path.read_bytes())):
        assert loaded["x"].dtype == dtype
        assert torch.equal(loaded["x"].double(), tensors["x"].double())


def test_each_tensor_begins_at_a_multiple_of_its_element_size(path):
    write(path, TENSORS)
    with open(path, "rb") as file:
        _, entries = tensor_file.read_header(file)
    assert all(entry.begin % DTYPES[entry.dtype].itemsize == 0 for entry in entries.values())


def header(text, data=b""):
    text = text if isinstance(text, bytes) else text.encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes):
    fields = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | changes
    return header(json.dumps({"x": fields}), bytes(4))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little"),
        header("")[:8],
        header("{}", b"more"),
        header("[" * 10**5),
        header("1" * 5000),
        header(b"\xff"),
        header("[]"),
        header('{"__metadata__": null}'),
        header('{"__metadata__": {"a": 1}}'),
        header('{"x": {}}'),
        header('{"x": 3}'),
        entry(dtype="U9"),
        entry(dtype=["U8"]),
        entry(dtype="F64"),
        entry(shape=4),
        entry(shape={}),
        entry(shape=[-4]),
        entry(shape=[4.0]),
        entry(shape=[True, 4]),
        entry(shape=[2**62, 4]),
        entry(shape=[2**62, 2**62, 0]),
        entry(data_offsets=[0]),
        entry(data_offsets=[0, 4, 8]),
        entry(data_offsets=[4, 0]),
        entry(data_offsets=[1, 5]),
        entry(data_offsets=["0", "4"]),
        entry(shape=[3], data_offsets=[0, 3]),
        entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0])[:-4],
    ],
    ids=range(30),
)
def test_what_breaks_the_format_is_a_value_error(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError):
        read(path)


def test_two_tensors_may_not_share_bytes(path):
    one = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    path.write_bytes(header(json.dumps({"x": one, "y": one}), bytes(4)))
    with pytest.raises(ValueError, match="'y' .* stands at bytes 0 to 4, not at 4 to 8"):
        read(path)


def test_bool_bytes_are_0_or_1(path):
    path.write_bytes(entry(dtype="BOOL")[:-1] + b"\x02")
    with pytest.raises(ValueError, match="holds bytes other than 0 and 1"):
        read(path)


def test_a_file_that_shrinks_meanwhile(path):
    write(path, TENSORS)
    with open(path, "rb", buffering=0) as file:
        _, entries = tensor_file.read_header(file)
        with open(path, "r+b") as other:
            other.truncate(path.stat().st_size - 1)
        last = max(entries, key=lambda key: entries[key].end)
        with pytest.raises(ValueError, match=f"ends within '{last}'"):
            tensor_file.read_tensor(file, last, entries[last], None)
