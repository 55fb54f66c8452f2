"""The choice of a kernel: one for every problem, that fits its device, and that a person can have printed."""

import itertools
import json

import pytest
import torch

from tests.ops.cuda.common import A100, DEVICES, H100, H200, OLD_TRITON, T4, problem
from torchao_superblock.ops.cuda import choose
from torchao_superblock.ops.cuda.choose import Choice
from torchao_superblock.ops.cuda.problem import FMA, TF32, TF32X3, Problem, bucket
from torchao_superblock.ops.cuda.tiles import HopperTile, MatmulTile

PRECISIONS = [
    (torch.bfloat16, 0),
    (torch.float32, TF32),
    (torch.float32, TF32X3),
    (torch.float32, FMA),
    (torch.float64, 0),
]
SHAPES = [(768, 3072), (3072, 768), (4096, 14336), (28672, 8192)]
BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (128, 32), (3, 5)]
# Bytes of shared memory that a program may have, and that each of two on a multiprocessor may.
SHARED_LIMIT = {1: 232448, 2: 115712}


def problems(kind: str, tokens: tuple[int, ...]) -> list[Problem]:
    grid = itertools.product(tokens, SHAPES, BLOCKS, (0.02, 0.1, 0.6), PRECISIONS, DEVICES)
    return [
        problem(M, N, K, block, share, dtype, kind=kind, precision=precision, device=device)
        for M, (N, K), block, share, (dtype, precision), device in grid
    ]


@pytest.mark.parametrize("kind", ["forward", "grad_x"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_every_product_has_a_choice_that_fits_and_that_tuning_would_try(
    kind: str, activation: str
) -> None:
    kernels, tiles = set(), set()
    for asked in problems(kind, (16, 50432)):
        asked = asked._replace(activation=activation)
        choice = choose.by_rule(asked)
        kernels.add(choice.kernel)
        tiles.add(choice.tile)
        assert choose.from_json(json.loads(json.dumps(choose.to_json(choice))), asked) == choice
        if choice.kernel == "matmul":
            assert choice == choose.plain(asked) and not choice.int64
            assert choice.tile.BM <= max(16, bucket(asked.M))
        else:
            assert asked.device.gluon
            tf32x3 = asked.precision == TF32X3
            tile, size = choice.tile, asked.dtype.itemsize
            stages = tile.stages(asked.R, asked.C, asked.c, size, tf32x3)
            assert stages is not None and stages.x >= 2
            assert stages.shared_bytes <= SHARED_LIMIT[tile.programs]
            assert not tile.cluster or asked.device.clusters
    assert kernels == {"matmul", "hopper"} and len(tiles) > 20


def test_every_gradient_of_values_has_a_choice() -> None:
    seen = set()
    for asked in problems("grad_values", (16, 512, 65536)):
        choice = choose.by_rule(asked)
        seen.add(choice.kernel)
        assert (choice.tile is None) is (choice.kernel == "dense")
        if choice.kernel == "lines":
            assert asked.dtype.itemsize == 2 and choice.tile.BG >= max(asked.r, asked.c)
    assert seen == {"blocks", "lines", "dense"}


def test_the_gradient_of_small_blocks_is_chosen_by_how_many_there_are() -> None:
    def kernel(
        block: tuple[int, int], share: float, M: int = 65536, dtype: torch.dtype = torch.bfloat16
    ) -> str:
        precision = TF32X3 if dtype == torch.float32 else 0
        asked = problem(M, 3072, 768, block, share, dtype, kind="grad_values", precision=precision)
        return choose.by_rule(asked).kernel

    for block in ((16, 16), (8, 8), (64, 16), (32, 32)):
        assert kernel(block, 0.5) == "dense"
        assert kernel(block, 0.02) == "lines"
        assert kernel(block, 0.5, M=512) == "lines"
        assert kernel(block, 0.5, dtype=torch.float32) == "blocks"
    assert kernel((64, 64), 0.5) == kernel((128, 128), 0.02) == "blocks"


def test_token_counts_share_few_buckets() -> None:
    assert [bucket(M) for M in (1, 16, 17, 1000, 1024, 1025)] == [16, 16, 32, 1024, 1024, 2048]
    assert bucket(10**9) == 65536
    assert len({bucket(M) for M in range(1, 200_000)}) == 13
    asked = problem(16, 3072, 768, 64, 0.1, device=A100)
    plain = {choose.plain(asked._replace(M=M)) for M in (33_000, 50_432, 65_536)}
    assert len(plain) == 1


@pytest.mark.parametrize(
    ("M", "N", "K", "block", "even"),
    [
        (16, 14336, 4096, 64, True),  # 224 programs
        (128, 14336, 4096, 64, True),
        (256, 14336, 4096, 64, False),  # 448: those that leave first make room for more
        (512, 4096, 14336, 64, True),  # 256
        (512, 4096, 14336, 128, True),  # 256 of 64 tokens
        (512, 768, 3072, 64, False),  # 48: one a processor
        (16, 4096, 14336, 64, True),  # five for a row
        (16, 4096, 4096, 64, False),  # 128 of 32 outputs
        (64, 4096, 14336, 64, False),  # split
    ],
)
def test_few_programs_a_processor_are_evened_out(
    M: int, N: int, K: int, block: int, even: bool
) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        choice = choose.plain(problem(M, N, K, block, 0.1, dtype))
        assert choice.tile.even is (even and dtype == torch.bfloat16)


def test_offsets_that_need_64_bits_are_noticed() -> None:
    small = problem(64, 1024, 1024, 64, 0.1)
    assert not choose.plain(small).int64
    assert choose.plain(small._replace(strides=(2**23, 1))).int64  # 256 rows further
    assert choose.plain(small._replace(strides=(1, 2**21))).int64  # 1024 columns further
    assert choose.plain(small._replace(nnz=2**19)).int64
    gradient = problem(64, 1024, 1024, 64, 0.1, kind="grad_values")
    assert not choose.by_rule(gradient).int64
    for strides in ((2**23, 1, 1024, 1), (1024, 1, 2**23, 1)):
        assert choose.by_rule(gradient._replace(strides=strides)).int64
    # A tile of lines spans a whole row of blocks.
    lines = problem(64, 1024, 1024, 16, 0.01, kind="grad_values", strides=(1, 2**21, 1024, 1))
    assert choose.by_rule(lines).kernel == "lines" and choose.by_rule(lines).int64


def test_a_smaller_tile_is_found_until_there_is_none() -> None:
    for choice in (
        choose.plain(problem(16, 4096, 4096, 64, 0.1)),
        choose.by_rule(problem(4096, 4096, 4096, 64, 0.1, kind="grad_values")),
    ):
        seen = {choice}
        with pytest.raises(RuntimeError, match="too little shared memory"):
            while True:
                smaller = choose.smaller(choice)
                assert smaller not in seen and smaller.kernel == choice.kernel
                seen.add(smaller)
                choice = smaller
        assert choice.tile.BM == 16 and choice.tile.num_stages == 1


def test_candidates_start_with_the_rule_and_can_be_launched() -> None:
    for M, block in itertools.product(
        (16, 64, 512, 65536), ((16, 16), (64, 64), (3, 5), (128, 32))
    ):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            asked = problem(M, 12 * block[0], 12 * block[1], block, 0.3, dtype, precision=0)
            choices = choose.candidates(asked)
            plain = [choice for choice in choices if choice.kernel == "matmul"]
            assert choices[0] == choose.plain(asked)
            assert len(set(choices)) == len(choices) and len(plain) <= 80
            assert all(choose.from_json(choose.to_json(c), asked) == c for c in choices)


# ---------------------------------------------------------------------------------------------------------------------
# When the Gluon kernel serves.

LARGE = problem(50432, 768, 768, 64, 0.1)


def test_the_gluon_kernel_serves_large_products_where_it_can_run() -> None:
    assert choose.by_rule(LARGE).kernel == "hopper"
    assert choose.by_rule(LARGE._replace(kind="grad_x")).kernel == "hopper"
    for device in (OLD_TRITON, A100, T4):
        assert choose.by_rule(LARGE._replace(device=device)).kernel == "matmul"


@pytest.mark.parametrize(
    "change",
    [
        {"M": 2047},
        {"strides": (1, 50432)},  # column-major
        {"strides": (0, 1)},  # expanded
        {"strides": (772, 1)},  # rows that do not start at 16 bytes
        {"aligned": (False, True)},
        {"aligned": (True, False)},
        {"nnz": 0},
        {"r": 8},  # below what a matrix instruction reads
        {"r": 48},  # neither a part nor a multiple of a strip
        {"c": 48},  # neither a part nor a multiple of a slice of x
        {"c": 8},
        {"dtype": torch.float64},
        {"R": 896, "C": 896, "r": 16, "c": 16, "strides": (896 * 16, 1)},  # too many masks
        {"dtype": torch.float32, "precision": TF32, "r": 16, "c": 16, "R": 48, "C": 48},
    ],
    ids=str,
)
def test_the_gluon_kernel_leaves_what_it_cannot_read_to_plain_triton(change: dict) -> None:
    assert choose.gluon_serves(LARGE)
    assert not choose.gluon_serves(LARGE._replace(**change))
    assert choose.by_rule(LARGE._replace(**change)).kernel == "matmul"


@pytest.mark.parametrize(
    ("N", "K", "block", "kernel"),
    [
        (1000, 768, 64, "hopper"),
        (1000, 1000, 32, "hopper"),
        (768, 1016, 64, "hopper"),
        (1000, 1000, 16, "matmul"),  # 63 block rows are not made of strips
        (2730, 1024, 64, "matmul"),  # rows of y do not start at 16 bytes
        (1024, 2730, 64, "matmul"),  # nor do those of x
        (50257, 64, 64, "matmul"),
    ],
)
def test_padded_blocks_are_served_where_rows_start_at_16_bytes(
    N: int, K: int, block: int, kernel: str
) -> None:
    for kind in ("forward", "grad_x"):
        asked = problem(50432, N, K, block, 0.1, kind=kind)
        assert (asked.N, asked.K) == (N, K)
        assert choose.by_rule(asked).kernel == kernel


def test_a_gradient_does_not_ask_where_the_values_start() -> None:
    """Its blocks are a copy."""
    gradient = LARGE._replace(kind="grad_x", aligned=(True, False))
    assert choose.gluon_serves(gradient)
    assert not choose.gluon_serves(gradient._replace(aligned=(False, True)))


@pytest.mark.parametrize(
    ("device", "block", "M", "served"),
    [
        (H200, 64, 50432, True),
        (H200, 64, 28000, False),
        (H100, 64, 28000, True),
        (H100, 64, 14000, False),
        (H100, 16, 14000, True),
        (H100, 16, 4096, False),
    ],
)
def test_short_calls_are_left_to_the_kernel_that_launches_faster(
    device, block: int, M: int, served: bool
) -> None:
    assert choose.gluon_serves(problem(M, 768, 768, block, 0.5, device=device)) is served


@pytest.mark.parametrize(
    ("K", "c", "share", "kernel"),
    [
        (768, 64, 0.1, "hopper"),
        (3072, 64, 0.1, "hopper"),
        (768, 32, 0.1, "hopper"),
        (3072, 32, 0.1, "matmul"),
        (3072, 32, 0.5, "hopper"),
    ],
)
def test_plain_triton_serves_float32_with_few_narrow_blocks_in_long_rows(
    K: int, c: int, share: float, kernel: str
) -> None:
    for precision in (TF32, TF32X3):
        asked = problem(50432, 768, K, c, share, torch.float32, precision=precision)
        assert choose.by_rule(asked).kernel == kernel


@pytest.mark.parametrize("device", [H200, H100], ids=lambda device: device.name)
@pytest.mark.parametrize(
    ("M", "N", "K", "block", "share", "pays"),
    [
        (8192, 4096, 14336, 128, 0.1, True),
        (2048, 8192, 28672, 128, 0.2, True),
        (8192, 2048, 8192, 128, 0.1, True),
        (2048, 2048, 8192, 128, 0.1, False),  # two rounds
        (8192, 4096, 14336, 128, 0.4, False),
        (8192, 2048, 5120, 128, 0.1, False),  # not long enough
        (8192, 14336, 8192, 128, 0.1, False),  # fits in L2
        (8192, 16384, 73728, 128, 0.1, False),  # the table leaves no room
        (8192, 8192, 28672, 64, 0.4, True),
        (4096, 5120, 13824, 64, 0.1, True),
        (8192, 4096, 14336, 64, 0.1, False),
        (8192, 8192, 28672, 64, 0.6, False),
        (8192, 16384, 28672, 64, 0.1, False),  # the table leaves no room
    ],
)
def test_programs_are_clustered_where_x_is_too_much_for_l2(
    M: int, N: int, K: int, block: int, share: float, pays: bool, device
) -> None:
    asked = problem(M, N, K, block, share, device=device)
    single = choose.hopper_tile(asked._replace(device=device._replace(clusters=False)))
    tile = choose.hopper_tile(asked)
    assert not single.cluster and tile.cluster is pays
    assert pays or tile == single


@pytest.mark.parametrize(
    ("M", "N", "K", "block", "share", "small"),
    [
        (50432, 3072, 768, 64, 0.1, True),
        (50432, 768, 3072, 128, 0.2, True),
        (8192, 1024, 4096, 64, 0.2, True),
        (8192, 4096, 14336, 64, 0.1, False),
        (2048, 14336, 4096, 64, 0.1, True),
        (2048, 14336, 4096, 64, 0.2, False),
        (8192, 14336, 4096, 128, 0.1, True),
        (8192, 14336, 4096, 128, 0.2, False),
        (8192, 57344, 8192, 64, 0.01, False),  # the table leaves no room
    ],
)
def test_two_programs_hide_activations_in_short_rows(
    M: int, N: int, K: int, block: int, share: float, small: bool
) -> None:
    asked = problem(M, N, K, block, share, device=H200._replace(clusters=False))
    tile = choose.hopper_tile(asked._replace(activation="gelu"))
    assert (tile.programs == 2) is small
    assert small or tile == choose.hopper_tile(asked)
    assert (
        choose.hopper_tile(asked).programs
        == choose.hopper_tile(asked._replace(activation="relu")).programs
        == 1
    )


def test_long_rows_of_different_lengths_get_a_dynamic_schedule() -> None:
    for block, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32)):
        asked = problem(8192, 5120, 13824, block, 0.1, dtype)
        assert choose.hopper_tile(asked).schedule == "dynamic"
        short = problem(8192, 2048, 2048, block, 0.1, dtype)
        assert choose.hopper_tile(short).schedule == "static"


# ---------------------------------------------------------------------------------------------------------------------
# What a person and tuning see.


def test_a_new_problem_and_its_choice_are_printed_once_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = problem(33, 128, 128, 64, 0.5, device=A100._replace(name="a card without a file"))
    choose.forget()
    choice = choose.choose(asked)
    assert capsys.readouterr().err == ""
    choose.forget()
    monkeypatch.setenv(choose.PRINT_VARIABLE, "1")
    assert choose.choose(asked) == choose.choose(asked) == choice
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and str(asked) in printed and str(choice) in printed
    choose.forget()


@pytest.mark.parametrize(
    "entry",
    [
        {"kernel": "matmul", "tile": {"BM": 16}},
        {"kernel": "a kernel", "tile": MatmulTile(16, 16, 16, 1, 4, 2)._asdict()},
        {"kernel": "matmul", "tile": MatmulTile(17, 16, 16, 1, 4, 2)._asdict()},
        {"kernel": "matmul", "tile": MatmulTile(16, 16, 512, 1, 4, 2)._asdict()},
        {"kernel": "matmul", "tile": MatmulTile(16, 16, 16, 1, 3, 2)._asdict()},
        {"kernel": "matmul", "tile": MatmulTile(16, 16, 16, 1, 4, 2, splits=0)._asdict()},
        {"kernel": "matmul", "tile": MatmulTile(16, 16, 16, 1, 4, 2, even=1)._asdict()},
        {"kernel": "hopper", "tile": HopperTile(256, 4)._asdict()},
        {"kernel": "hopper", "tile": {"tokens": 256, "strips": 2, "slots": 3}},
        {"tile": {}},
        3,
    ],
    ids=str,
)
def test_what_is_no_choice_of_this_version_is_refused(entry) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        choose.from_json(entry, LARGE)
    assert isinstance(choose.from_json(choose.to_json(choose.plain(LARGE)), LARGE), Choice)
