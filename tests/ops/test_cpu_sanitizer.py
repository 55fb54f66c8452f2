"""The C sources of the CPU kernel, built with AddressSanitizer and UndefinedBehaviorSanitizer."""

import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import torchao_superblock.ops
from benchmarks.faults.sanitizer import FLAGS, compiler

CSRC = Path(torchao_superblock.ops.__file__).with_name("csrc")
DRIVER = Path(__file__).with_name("cpu_sanitizer.c")


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, **options
    )


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory):
    """Builds a program of the kernel's sources and one more file, with the sanitizers."""
    cc = compiler()
    if cc is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("sanitizer")
    probe = directory / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    linked = run(cc, *FLAGS, probe, "-o", directory / "probe")
    if linked.returncode or run(directory / "probe").returncode:
        pytest.skip(f"{cc} has no working sanitizers here: {linked.stderr[-200:]}")

    def compile_one(source: Path) -> Path:
        out = directory / f"{source.stem}.o"
        result = run(cc, *FLAGS, "-I", CSRC, "-c", source, "-o", out)
        assert result.returncode == 0, result.stderr
        return out

    sources = [path for path in sorted(CSRC.glob("*.c")) if path.name != "module.c"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))

    def link(main: Path) -> Path:
        program = directory / main.stem
        result = run(
            cc, *FLAGS, compile_one(main), *objects, "-o", program, "-lm", "-ldl", "-lpthread"
        )
        assert result.returncode == 0, result.stderr
        return program

    return link


@pytest.fixture(scope="module")
def driver(build) -> Path:
    return build(DRIVER)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_kernels_stay_in_bounds_and_correct(driver: Path, isa: str) -> None:
    result = run(driver, isa)
    if (
        result.returncode == 2
        and platform.machine() not in ("x86_64", "AMD64")
        and isa != "baseline"
    ):
        pytest.skip(f"{isa} is of x86-64")
    if result.returncode == 2 and isa != "baseline":
        pytest.skip(f"this processor has no {isa}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"problems with {isa}" in result.stdout


def test_the_build_catches_an_overrun(build, tmp_path: Path) -> None:
    """The check of the check: an output one row too small must end the program."""
    main = tmp_path / "overrun.c"
    main.write_text(
        """
        #include <stdlib.h>
        #include "superblock.h"
        int main(void) {
            const int32_t crow[] = {0, 1}, col[] = {0};
            float *x = calloc(13 * 16, 4), *values = calloc(16 * 16, 4), *y = calloc(12 * 16, 4);
            const sb_product p = {.x = x, .x_row = 16, .x_col = 1, .crow = crow, .col = col,
                                  .values = values, .y = y, .M = 13, .N = 16, .K = 16, .R = 1, .C = 1,
                                  .r = 16, .c = 16, .nnz = 1, .dtype = SB_FLOAT32, .threads = 1};
            return sb_run_product(&p);
        }
        """
    )
    result = run(build(main))
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
