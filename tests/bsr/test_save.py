import gc
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tests.bsr.common import Model, prune
from tests.injection import each_interruption
from torchao_superblock import SupermaskSparsifier
from torchao_superblock.bsr import load_bsr, save_bsr, swap_to_bsr
from torchao_superblock.bsr.atomic_file import replacing


@pytest.fixture
def swapped():
    torch.manual_seed(3)
    model = Model().eval()
    prune(model.up, 16)
    prune(model.down, (8, 16))
    swap_to_bsr(model, min_sparsity=0.25)
    return model


def test_the_metadata_describes_the_layers(swapped, tmp_path):
    save_bsr(swapped, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["layers"])["down"] == {
        "in_features": 64,
        "out_features": 32,
        "blocksize": [8, 16],
        "activation": "none",
        "bias": False,
    }


def test_the_file_is_what_safetensors_reads(swapped, tmp_path):
    swapped.register_buffer("flags", torch.tensor([[True, False]]))
    swapped.register_buffer("empty", torch.zeros(0, 3, dtype=torch.float16))
    swapped.register_buffer("single", torch.tensor(3, dtype=torch.uint8))
    swapped.register_buffer("transposed", torch.randn(3, 5, dtype=torch.bfloat16).t())
    swapped.register_buffer("negated", torch.randn(4, dtype=torch.complex64).conj().imag)
    swapped.register_buffer("eight", torch.randn(7).to(torch.float8_e4m3fn))
    save_bsr(swapped, tmp_path / "m.safetensors")
    loaded = load_file(tmp_path / "m.safetensors")
    state = swapped.state_dict()
    assert loaded.keys() == state.keys() - {"head.weight"}  # stored once, as embedding.weight
    for key, tensor in loaded.items():
        assert (tensor.dtype, tensor.shape) == (state[key].dtype, state[key].shape), key
        assert torch.equal(tensor.double(), state[key].double()), key


def test_the_version_says_whether_features_were_dropped(tmp_path):
    for drop, version in ((True, "2"), (False, "1")):
        model = nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32)).eval()
        with torch.no_grad():
            model[0].weight[:32] = 0
        swap_to_bsr(model, 16, min_sparsity=0.0, drop_dead_features=drop)
        save_bsr(model, tmp_path / "m.safetensors")
        with safe_open(tmp_path / "m.safetensors", "pt") as file:
            assert file.metadata()["version"] == version


def test_equal_models_give_equal_files(swapped, tmp_path):
    save_bsr(swapped, tmp_path / "0")
    for n in range(1, 10):
        fresh = load_bsr(Model().eval(), tmp_path / f"{n - 1}")
        save_bsr(fresh, tmp_path / f"{n}")
    assert len({(tmp_path / f"{n}").read_bytes() for n in range(10)}) == 1


def test_wrappers_leave_no_trace_in_the_names(swapped, tmp_path):
    save_bsr(swapped, tmp_path / "plain")
    for wrapped in (torch.compile(swapped, backend="eager"), nn.DataParallel(swapped)):
        save_bsr(wrapped, tmp_path / "wrapped")
        assert (tmp_path / "plain").read_bytes() == (tmp_path / "wrapped").read_bytes()


class TestRefusals:
    """By name, with the path, before a file is touched."""

    @staticmethod
    def check(model, tmp_path, error, words):
        path = tmp_path / "m.safetensors"
        path.write_bytes(b"before")
        with pytest.raises(error, match=words) as caught:
            save_bsr(model, path)
        assert str(path) in str(caught.value)
        assert path.read_bytes() == b"before"
        assert list(tmp_path.iterdir()) == [path]

    def test_what_is_no_tensor(self, tmp_path):
        class Extra(nn.Linear):
            def get_extra_state(self):
                return {"a": 1}

        words = r"'0\._extra_state'.*dict, not a tensor"
        self.check(nn.Sequential(Extra(4, 4)), tmp_path, TypeError, words)

    def test_the_meta_device(self, tmp_path):
        words = "'weight' is on the meta device"
        self.check(nn.Linear(4, 4, device="meta"), tmp_path, ValueError, words)

    def test_a_mask_that_is_not_squashed(self, tmp_path):
        model = Model()
        SupermaskSparsifier(blocksize=16).prepare(model, [{"tensor_fqn": "up.weight"}])
        self.check(model, tmp_path, RuntimeError, "block mask of 'up' is not squashed")

    def test_more_than_dense_numbers(self, tmp_path):
        model = nn.Module()
        for tensor, words in (
            (torch.zeros(3, dtype=torch.complex64), "'x' has the dtype torch.complex64"),
            (torch.eye(4).to_sparse_csr(), "'x' has the layout torch.sparse_csr"),
            (torch.eye(4).to_sparse(), "'x' has the layout torch.sparse_coo"),
            (
                torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
                r"'x' is quantized \(torch.qint8\)",
            ),
        ):
            model.register_buffer("x", tensor)
            self.check(model, tmp_path, TypeError, words)

    def test_a_lazy_layer(self, tmp_path):
        model = nn.Sequential(nn.LazyLinear(4))
        self.check(model, tmp_path, TypeError, "'0.weight' has no shape yet")

    def test_a_weight_that_torchao_quantized(self, tmp_path):
        quantization = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(nn.Linear(64, 64))
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        self.check(model, tmp_path, TypeError, "'0.weight' is a .*Tensor")

    def test_a_sharded_weight(self, tmp_path):
        script = """
            import sys, torch, torch.distributed as dist
            from torch import nn
            from torch.distributed.tensor import distribute_tensor, init_device_mesh, Shard
            from torchao_superblock import save_bsr
            dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
            model = nn.Sequential(nn.Linear(8, 8))
            mesh = init_device_mesh("cpu", (1,))
            model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.data, mesh, [Shard(0)]))
            try:
                save_bsr(model, sys.argv[1] + "/m")
            except TypeError as error:
                assert "'0.weight' is sharded (a DTensor)" in str(error), error
            else:
                raise AssertionError("saved")
            dist.destroy_process_group()
        """
        run(script, tmp_path, 0)

    def test_a_root_layer(self, swapped, tmp_path):
        self.check(swapped.up, tmp_path, ValueError, "itself a BSRLinear.*nn.Sequential")

    def test_indices_that_are_no_pattern(self, swapped, tmp_path):
        with torch.no_grad():
            swapped.up.col_indices.add_(1)
        self.check(swapped, tmp_path, ValueError, "up: col_indices must lie in")


def run(script, tmp_path, status):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr


class TestPlaces:
    def test_a_directory_that_does_not_exist(self, swapped, tmp_path):
        path = tmp_path / "nowhere" / "m.safetensors"
        with pytest.raises(FileNotFoundError, match="directory does not exist") as caught:
            save_bsr(swapped, path)
        assert str(path) in str(caught.value)

    def test_what_is_no_file(self, swapped, tmp_path):
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "pipe")
        for name, error in (("folder", IsADirectoryError), ("pipe", OSError)):
            with pytest.raises(error, match=name):
                save_bsr(swapped, tmp_path / name)
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)

    @pytest.mark.parametrize("name", ["x" * 250, os.fsdecode(b"caf\xe9.safetensors"), "ü" * 120])
    def test_any_name_will_do(self, swapped, tmp_path, name):
        for _ in range(2):
            save_bsr(swapped, tmp_path / name)
        assert os.listdir(tmp_path) == [name]
        load_bsr(Model(), tmp_path / name)

    def test_a_file_that_is_replaced_keeps_its_mode_and_a_new_one_has_that_of_open(
        self, swapped, tmp_path
    ):
        open(tmp_path / "plain", "w").close()
        path = tmp_path / "m.safetensors"
        save_bsr(swapped, path)
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
        for mode in (0o600, 0o664, 0o400):
            path.chmod(mode)
            save_bsr(swapped, path)
            assert stat.S_IMODE(path.stat().st_mode) == mode

    @pytest.mark.parametrize("exists", [True, False])
    def test_a_symbolic_link_stays(self, swapped, tmp_path, exists):
        (tmp_path / "store").mkdir()
        target, link = tmp_path / "store" / "m.safetensors", tmp_path / "link"
        if exists:
            target.write_bytes(b"old")
        link.symlink_to(target)
        save_bsr(swapped, link)
        assert link.is_symlink() and not target.is_symlink()
        load_bsr(Model(), target)
        assert os.listdir(tmp_path / "store") == [target.name]


def test_a_full_disk_leaves_the_old_file(swapped, tmp_path):
    path = tmp_path / "m.safetensors"
    save_bsr(swapped, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="save_bsr: File too large") as caught:
            save_bsr(swapped, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_exception_anywhere_leaves_the_old_file_or_the_new(tmp_path, error):
    path, model = tmp_path / "m.safetensors", nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    swap_to_bsr(model, 8, min_sparsity=0.0)
    save_bsr(model, path)
    new = path.read_bytes()

    def prepare():
        path.write_bytes(b"old")
        return lambda: save_bsr(model, path)

    contents = {b"old": 0, new: 0}
    for _ in each_interruption(prepare, 61, error):
        contents[path.read_bytes()] += 1
        gc.collect()
        save_bsr(model, path)
        assert os.listdir(tmp_path) == [path.name]
    assert contents[b"old"] > 0 and len(contents) == 2


def test_a_kill_leaves_the_old_file_and_the_next_save_cleans_up(swapped, tmp_path):
    path = tmp_path / "m.safetensors"
    save_bsr(swapped, path)
    before = path.read_bytes()
    script = """
        import resource, signal, sys
        from torch import nn
        from torchao_superblock import save_bsr
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills who writes beyond the limit
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save_bsr(nn.Sequential(nn.Linear(512, 512)), sys.argv[1] + "/m.safetensors")
    """
    run(script, tmp_path, -signal.SIGXFSZ)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    save_bsr(swapped, tmp_path / "another")  # whose draft it is not
    assert len(list(tmp_path.iterdir())) == 3
    save_bsr(swapped, path)
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "another"}


def test_a_save_that_goes_on_elsewhere_is_not_disturbed(swapped, tmp_path):
    path = tmp_path / "m.safetensors"
    with replacing(path) as file:
        file.write(b"of the other one")
        save_bsr(swapped, path)
        load_bsr(Model(), path)
    assert path.read_bytes() == b"of the other one"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_it_has_the_name(swapped, tmp_path, monkeypatch):
    path, calls = tmp_path / "m.safetensors", []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        status = os.fstat(descriptor)
        calls.append(("fsync", stat.S_ISDIR(status.st_mode), path.exists()))
        fsync(descriptor)

    def recorded_replace(source, target):
        calls.append(("replace", os.path.getsize(source) > 10_000, path.exists()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    save_bsr(swapped, path)
    assert calls == [("fsync", False, False), ("replace", True, False), ("fsync", True, True)]
