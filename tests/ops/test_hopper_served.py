"""Which calls the Gluon kernel serves rather than the plain ones, by rule or because tuning found it."""

import pytest
import torch

from tests.ops.hopper_cases import hopper_or_skip, needs_clusters, needs_compiler
from tests.reference import random_bsr
from torchao_superblock.ops import hopper


@needs_clusters
def test_calls_are_given_pairs_where_triton_has_them(monkeypatch):
    monkeypatch.setattr(hopper, "_processors", lambda index: 132)
    monkeypatch.setattr(hopper, "_memory_speed", lambda index: 4800)
    x = torch.empty(8192, 28672, device="meta", dtype=torch.bfloat16)
    crow = torch.empty(129, device="meta", dtype=torch.int32)
    values = torch.empty(5734, 64, 64, device="meta", dtype=torch.bfloat16)
    assert hopper._choose(x, crow, values, "none") == hopper.PAIRS
    monkeypatch.setattr(hopper, "_CLUSTERS", False)
    assert hopper._choose(x, crow, values, "none") == hopper.TWO_DRAWN


@needs_compiler
@pytest.mark.parametrize(
    ("K", "c", "share", "gluon"),
    [
        (768, 64, 0.1, True),
        (3072, 64, 0.1, True),
        (768, 32, 0.1, True),
        (3072, 32, 0.1, False),
        (3072, 32, 0.5, True),
    ],
)
def test_plain_triton_serves_float32_only_with_few_narrow_blocks_in_long_rows(
    monkeypatch, K, c, share, gluon
):
    from torchao_superblock.ops import cuda

    monkeypatch.setattr(cuda, "INTERPRET", False)
    monkeypatch.setattr(cuda, "_device", lambda index: cuda._Device(90, 132))
    monkeypatch.setattr(cuda, "_tuned_devices", {0})
    monkeypatch.setattr(hopper, "supports", lambda *call: True)
    monkeypatch.setattr(cuda, "_load_hopper", lambda: hopper)
    nnz = round(768 // c * (K // c) * share)
    x = torch.empty(50432, K, device="meta")
    crow = torch.empty(768 // c + 1, device="meta", dtype=torch.int32)
    col = torch.empty(nnz, device="meta", dtype=torch.int32)
    values = torch.empty(nnz, c, c, device="meta")
    served = cuda.hopper_kernel(x, crow, col, values, None, "none", None, 0)
    assert served is (hopper.forward if gluon else None)


@needs_compiler
def test_a_tuned_tile_of_the_gluon_kernel_is_used_in_the_next_process(monkeypatch, tmp_path):
    """Also where no plain kernel is ever prepared."""
    from torchao_superblock.ops import cuda, tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "INTERPRET", False)
    monkeypatch.setattr(cuda, "_device", lambda index: cuda._Device(90, 132))
    monkeypatch.setattr(cuda, "_load_hopper", lambda: hopper)
    monkeypatch.setattr(hopper, "supports", lambda *call: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a Hopper")
    monkeypatch.setattr(cuda, "_tuned", {})
    x = torch.empty(50432, 768, device="meta", dtype=torch.bfloat16)
    crow = torch.empty(49, device="meta", dtype=torch.int32)
    col = torch.empty(58, device="meta", dtype=torch.int32)
    values = torch.empty(58, 64, 64, device="meta", dtype=torch.bfloat16)

    def served(activation="none"):
        return cuda.hopper_kernel(x, crow, col, values, None, activation, None, 0)

    problem = cuda._forward_problem(x, crow, values, "none", 65536, 0)
    found = cuda.Found(cuda.matmul_tile(problem), False, hopper.TWO_STRIPS)

    monkeypatch.setattr(cuda, "_tuned_devices", set())
    assert served() is hopper.forward
    tuning._save({problem: found}, 0)
    monkeypatch.setattr(cuda, "_tuned_devices", set())
    assert served().keywords == {"tile": hopper.TWO_STRIPS}
    assert served("gelu") is hopper.forward
    # What was found for a forward says nothing about a gradient of the same shape.
    gradient = cuda.hopper_kernel(x, crow, col, values, None, "none", None, 0, tuned=False)
    assert gradient is hopper.forward
    tuning._save({problem: found._replace(plain=True, strips=None)}, 0)
    monkeypatch.setattr(cuda, "_tuned_devices", set())
    assert served() is None
    # A tile that this problem cannot have is passed over; other finds stay.
    other = problem._replace(activation="relu")
    tuning._save({problem: found._replace(strips=hopper.COPIED_16), other: found}, 0)
    monkeypatch.setattr(cuda, "_tuned", {})
    monkeypatch.setattr(cuda, "_tuned_devices", set())
    with pytest.warns(UserWarning, match="passed over.*is not a tile of this version"):
        assert served() is hopper.forward
    assert served("relu").keywords == {"tile": hopper.TWO_STRIPS}


@needs_compiler
@pytest.mark.parametrize(
    ("plain_us", "gluon_us", "right", "rule_is_plain", "expected"),
    [
        (100, {}, True, False, "rule"),
        (100, {"TWO_STRIPS": 90}, True, False, "TWO_STRIPS"),
        (100, {"TWO_STRIPS": 98.5}, True, False, "rule"),  # a draw
        (90, {}, True, False, "plain"),
        (98.5, {}, True, False, "rule"),
        (98.5, {}, True, True, "plain"),
        (100.5, {}, True, True, "plain"),
        (110, {}, True, True, "rule"),
        (100, {"TWO_STRIPS": 1}, False, False, "plain"),  # wrong numbers are no candidates
    ],
)
def test_tuning_chooses_between_the_kernels(
    monkeypatch, plain_us, gluon_us, right, rule_is_plain, expected
):
    from torchao_superblock.ops import cuda, tuning

    x = torch.randn(4096, 256).bfloat16()
    _dense, crow, col, values = random_bsr(128, 256, 64, dtype=torch.bfloat16)
    y = torch.randn(4096, 128)
    times = {getattr(hopper, name): us for name, us in gluon_us.items()}

    def microseconds(run):
        assert run().shape == y.shape
        tile = getattr(run, "keywords", {}).get("tile")
        return plain_us if tile is None else times.get(tile, 100)

    monkeypatch.setattr(tuning, "INTERPRET", True)
    monkeypatch.setattr(tuning, "_microseconds", microseconds)
    monkeypatch.setattr(tuning, "candidates", lambda problem: [cuda.matmul_tile(problem)])
    monkeypatch.setattr(cuda, "_device", lambda index: cuda._Device(90, 132))
    monkeypatch.setattr(cuda, "_load_hopper", lambda: hopper)
    monkeypatch.setattr(cuda, "forward", lambda *call: y)
    monkeypatch.setattr(cuda, "_plain_forward", lambda *call: y)
    served = None if rule_is_plain else hopper.forward
    monkeypatch.setattr(cuda, "hopper_kernel", lambda *call: served)
    monkeypatch.setattr(hopper, "supports", lambda *call: True)
    monkeypatch.setattr(hopper, "_choose", lambda *call: hopper.THREE_STRIPS)
    monkeypatch.setattr(hopper, "forward", lambda *call, tile: y if right else y + 1)
    monkeypatch.setattr(cuda, "_tuned", {})
    problem = cuda._forward_problem(x, crow, values, "none", 4096, 0)
    arguments = (x, crow, col, values, None, "none", None)
    found = tuning._tune_call(arguments, problem, 0)
    strips = {"plain": None, "rule": hopper.THREE_STRIPS}.get(expected)
    if expected == "TWO_STRIPS":
        strips = hopper.TWO_STRIPS
    assert (found.strips, found.plain) == (strips, expected == "plain")
    assert cuda._tuned == {problem: cuda.Found(found.tile, found.plain, strips)}
    y[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or an infinity"):
        tuning._tune_call(arguments, problem, 0)


def test_supports_says_no_without_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(hopper, "_processors", lambda index: 0)
    _dense, crow, col, values = random_bsr(128, 128, 64, dtype=torch.bfloat16)
    x = torch.zeros(4096, 128, dtype=torch.bfloat16)
    assert not hopper.supports(x, crow, col, values, None, "none", None)
    reason = hopper.unavailable_reason(0)
    assert reason is not None and ("sm_90" in reason or "Gluon" in reason)


def _refused(name):
    """x and values that break one precondition of the kernel."""
    _dense, crow, col, values = random_bsr(128, 128, 64, dtype=torch.bfloat16)
    x = torch.zeros(4096, 128, dtype=torch.bfloat16)
    if name == "few tokens":
        x = x[:100]
    if name == "column-major x":
        x = torch.zeros(128, 4096, dtype=torch.bfloat16).t()
    if name == "expanded x":
        x = x[:1].expand(4096, 128)
    if name == "unaligned rows":
        x = torch.zeros(4096, 132, dtype=torch.bfloat16)[:, :128]
    if name == "unaligned start":
        x = torch.zeros(4096, 136, dtype=torch.bfloat16)[:, 1:129]
    if name == "no stored block":
        _dense, crow, col, values = random_bsr(
            128, 128, 64, dtype=torch.bfloat16, mask=torch.zeros(2, 2, dtype=torch.bool)
        )
    return x, crow, col, values


@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        "few tokens",
        "column-major x",
        "expanded x",
        "unaligned rows",
        "unaligned start",
        "no stored block",
    ],
)
def test_supports_declines_what_tma_cannot_read(monkeypatch, name):
    monkeypatch.setattr(hopper, "_processors", lambda index: 132)
    monkeypatch.setattr(hopper, "_memory_speed", lambda index: 4800)
    monkeypatch.setattr(hopper, "_MIN_MICROSECONDS", 0)
    x, crow, col, values = _refused("nothing")
    assert hopper.supports(x, crow, col, values, None, "none", None)
    x, crow, col, values = _refused(name)
    assert not hopper.supports(x, crow, col, values, None, "none", None)


@needs_compiler
def test_supports_leaves_short_calls_to_the_kernels_that_launch_faster(monkeypatch):
    monkeypatch.setattr(hopper, "_processors", lambda index: 132)
    for speed, blocksize, M, served in (
        (4800, 64, 50432, True),
        (4800, 64, 28000, False),
        (3350, 64, 28000, True),
        (3350, 64, 14000, False),
        (3350, 16, 14000, True),
        (3350, 16, 4096, False),
    ):
        monkeypatch.setattr(hopper, "_memory_speed", lambda index, speed=speed: speed)
        _dense, crow, col, values = random_bsr(768, 768, blocksize, dtype=torch.bfloat16)
        x = torch.empty(M, 768, dtype=torch.bfloat16)
        assert hopper.supports(x, crow, col, values, None, "none", None) is served


def test_exact_float32_follows_torchs_switch(set_precision):
    set_precision("tf32")
    assert not hopper._exact(torch.float32)
    set_precision("ieee")
    assert hopper._exact(torch.float32)
    assert not hopper._exact(torch.bfloat16)


@pytest.mark.gpu
def test_slow_memory_is_an_h100_s():
    hopper_or_skip()
    name = torch.cuda.get_device_name()
    if "H200" not in name and "H100" not in name:
        pytest.skip(f"neither an H100 nor an H200: {name}")
    assert hopper._slow_memory(0) is ("H100" in name)
