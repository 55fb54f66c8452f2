"""What the README and the pages beside it promise: it runs as it stands there, exists, and was measured."""

import csv
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from torchao_superblock import SupermaskSparsifier, swap_to_bsr

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


class TinyEncoder(nn.Module):
    """Names its MLP weights as the usage's glob expects them."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256))})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([block])})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder["layers"][0]["mlp"](x)


def test_the_usage_runs(capsys):
    model = TinyEncoder()

    class Loss:
        def backward(self) -> None:
            model(torch.randn(3, 256)).square().mean().backward()

    (usage,) = fenced("python")
    names = {"torch": torch, "model": model, "loader": range(2), "loss": Loss()}
    exec(compile(usage, "README.md", "exec"), names)
    assert len(names["report"].swapped) + len(names["report"].skipped) == 2
    assert "encoder.layers.0.mlp.0" in capsys.readouterr().out


@pytest.mark.parametrize("marker", ["main command", "test command"])
def test_the_commands_are_marked_for_ci_and_need_no_other_setup(marker):
    found = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)```", README, flags=re.DOTALL)
    assert found is not None
    lines = found.group(1).strip().splitlines()
    assert lines[0] == "python3 -m venv .venv"
    assert all(line.startswith(".venv/bin/") for line in lines[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_it_links_to_exists(page):
    linked = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert linked or page.name != "README.md"
    for name in linked:
        assert (page.parent / name).exists(), name


def test_every_path_on_its_map_exists():
    (tree,) = fenced("text")
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        name, _, words = line.strip().partition(" ")
        path = ROOT.joinpath(*folders[:depth], name)
        assert path.is_dir() if name.endswith("/") else path.is_file(), path
        folders[depth:] = [name]
        for file in re.findall(r"[\w/]+\.py", words):
            assert (path / file).is_file(), file
    assert "torchao_superblock/" in tree and "tests/" in tree


def test_every_file_they_name_exists():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = re.findall(r"`((?:examples|benchmarks|torchao_superblock|tests|docs)/[\w/.]*)`", text)
    named = [name for name in named if "NAME" not in name]  # stands for the reader's own file
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_room_that_contributing_names_exists():
    package = ROOT / "torchao_superblock"
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:bsr|common|masks|ops|pruning)/[\w/.]*)`", text)
    assert {"bsr/layers.py", "masks/base.py", "ops/pytorch.py"} <= set(named)
    for name in named:
        assert (package / name).exists() or (package / "pruning" / name).exists(), name


def newest(pattern: str, words: str) -> Path:
    """The newest result file that holds these words."""
    found = [p for p in RESULTS.glob(pattern) if words in p.read_text(encoding="utf-8")]
    return max(found, key=lambda path: path.name)


def test_its_numbers_were_measured():
    speedup = runpy.run_path(str(ROOT / "docs" / "speedup.py"))
    _, rows = speedup["newest_run"]()

    def at_90(column: str, block: int = 64, what: str = "all") -> str:
        return f"{dict(speedup['curve'](rows, block, column, what))[0.9]:.2f}x"

    with newest("*_figure6_cuda_nvidia-h200.csv", "").open(newline="") as file:
        huge = {
            (row["what"], row["sparsity"]): float(row["ours x"]) for row in csv.DictReader(file)
        }
    assert f"- **{at_90('ours x')}**: the whole ViT-B/16 in bfloat16" in README
    assert (
        f"{at_90('ours x', what='mlp')} with its MLPs alone; {huge['all', '0.9']:.2f}x for ViT-H/14."
        in README
    )
    caption = README[README.index("![Speedup of a whole") :].partition("](docs/speedup.png)")[0]
    for value in (
        at_90("ours x"),
        at_90("ours narrow x"),
        at_90("ours x", 32),
        at_90("ours x", 16),
    ):
        assert value in caption

    with newest("*_figure1_cuda_nvidia-h200.csv", "").open(newline="") as file:
        layers = {
            row["what"]: row
            for row in csv.DictReader(file)
            if (row["mode"], row["block"], row["sparsity"]) == ("bfloat16", "64", "0.9")
        }
    up, down = layers["3072 x 768"], layers["768 x 3072"]
    ours, peers = (
        [f"{float(row[column]):.1f}x" for row in (up, down)] for column in ("ours x", "torch BSR x")
    )
    assert f"- **{ours[0]}** and **{ours[1]}**: the two layers" in README
    assert f"torch's own BSR {peers[0]} and {peers[1]}." in README

    job = newest("*_digits_vit_cpu_*.md", "dense twin").read_text(encoding="utf-8")
    patterns = (r"after the swap \| [^/]*/ [^/]*/ ([\d.]+)%", r"dense twin +\| ([\d.]+)%")
    sparse, dense = (float(re.search(pattern, job).group(1)) for pattern in patterns)
    faster = re.search(r"dense / BSR +\| .*: ([\d.]+)x", job).group(1)
    assert f"- **{faster}x** on two CPU cores" in README
    assert (
        f"at {sparse:.1f} % test accuracy" in README and f"dense twin has {dense:.1f} %" in README
    )


def test_its_picture_is_of_the_newest_run_and_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    speedup = runpy.run_path(str(ROOT / "docs" / "speedup.py"))
    source, rows = speedup["newest_run"]()
    assert source.with_suffix(".md").name in (ROOT / "docs" / "results.md").read_text()
    (axes,) = speedup["draw"](rows).axes
    written = " ".join(text.get_text() for text in axes.texts)
    assert all(
        word in written for word in ("dense", "block 16", "block 32", "block 64", "torch's BSR")
    )
    styles = [line.get_linestyle() for line in axes.lines]
    assert styles.count("-") == 4 and styles.count("-.") == styles.count("--") == 1
    dense, *curves = (line.get_ydata() for line in axes.lines)
    assert set(dense) == {1} and min(len(speedups) for speedups in curves) >= 3
    with pytest.raises(FileNotFoundError, match=r"benchmarks/figures\.py 2"):
        speedup["newest_run"](tmp_path)
    for date in ("2026-11-30", "2026-12-01"):
        path = tmp_path / f"{date}_figure2_cuda_nvidia-h200.csv"
        path.write_text(f"mode,day\nbfloat16,{date}\n")
    assert speedup["newest_run"](tmp_path) == (path, [{"mode": "bfloat16", "day": "2026-12-01"}])


@pytest.mark.parametrize(
    ("shape", "blocksize", "code", "stored"),
    [
        ((96, 384), None, "swapped", (32, 64)),
        ((776, 768), None, "slower_than_dense", (8, 64)),
        ((100, 384), None, "shape_not_multiple", None),
        ((96, 384), 64, "shape_not_multiple", (64, 64)),
    ],
)
def test_what_it_says_of_blocks_that_do_not_tile_a_weight(shape, blocksize, code, stored):
    assert f"{shape[0]} x {shape[1]}" in README
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    sparsifier = SupermaskSparsifier(sparsity_level=0.5, blocksize=64)
    sparsifier.prepare(model, config=None)
    scores = model[0].parametrizations.weight[0].scores
    with torch.no_grad():  # a checkerboard: neighbours never make a larger block
        scores.copy_(torch.arange(scores.shape[0])[:, None] + torch.arange(scores.shape[1]) + 1)
        scores.remainder_(2)
    sparsifier.step()
    x = torch.randn(3, shape[1])
    masked = model(x)
    sparsifier.squash_mask()
    # Without a compiled kernel these blocks break even later; that is not what is asked here.
    least = 0.4 if code == "swapped" else None
    report = swap_to_bsr(model, blocksize, min_sparsity=least)
    (entry,) = [*report.swapped, *report.skipped]
    assert (entry.code, entry.blocksize) == (code, stored)
    assert torch.allclose(model(x), masked, atol=1e-5)


def test_every_option_it_names_exists():
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    )
    named = {
        option
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if not any(other in line for other in ("mkdocs", "torchrun", "pytest"))  # options of others
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)
    }
    assert {"--compare-dense", "--data-path", "--label"} <= named
    for option in named:
        assert f'"{option}"' in sources, option
