"""The campaign finds what is broken, survives what crashes, repeats a case, and says all of it."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import reliability
from benchmarks.faults import campaign, gradients, sanitizer
from benchmarks.faults.case import Fault, Kind, NotHere, Outcome, attempt
from benchmarks.faults.portrait import differences, identities, portrait
from benchmarks.faults.soak import Soak

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def known() -> dict[str, Kind]:
    return campaign.kinds()


def test_the_long_mode_is_as_long_as_promised(known):
    def total(*names: str) -> int:
        return sum(known[name].long * known[name].unit for name in names)

    assert total("files") >= 20_000
    assert total("op/hostile") >= 10_000 and known["op/hostile"].sanitizer
    assert total("gradients/op", "gradients/masked") >= 10_000
    assert total("kills") >= 300
    assert total("soak/forward") >= 300_000
    for name, kind in known.items():
        if name.startswith("exception/"):
            assert kind.count(long=True) == 2 * kind.lines  # both exceptions at every line


def test_a_case_is_made_from_its_name_and_index(known):
    for name in ("files", "op/hostile", "state_dicts"):
        first, again = ([attempt(known[name], i) for i in range(12)] for _ in range(2))
        assert [(o.word, o.fault) for o in first] == [(o.word, o.fault) for o in again]


@pytest.mark.parametrize(
    "name", ["gradients/op", "gradients/masked", "threads/forward", "exception/swap_to_bsr"]
)
def test_kinds_pass_where_nothing_is_broken(known, name):
    """(Of all kinds `.ci/run` tries more than would fit here.)"""
    assert not [o for o in (attempt(known[name], index) for index in range(0, 4, 2)) if o.fault]


def test_wrong_numbers_are_found():
    y = torch.randn(3, 4)
    gradients.check("output", y + 1e-7, y, torch.float32)
    for wrong in (None, 1.01 * y, y * float("nan"), y[:2], y.double()):
        with pytest.raises(Fault, match="output"):
            gradients.check("output", wrong, y, torch.float32)


def test_growing_memory_is_found():
    kept = []

    class Leak(Soak):
        def calls(self, index):
            return lambda i: kept.append(bytearray(1000))

    assert attempt(Leak("leak", "", 1000, 1, 1), 0).fault == "memory grows"


def test_a_portrait_shows_what_changed():
    def build():
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    before = portrait(build())
    assert portrait(build()) == before
    for change, words in (
        (lambda model: model[0].weight.data[0].zero_(), "0.weight"),
        (lambda model: model[1].num_batches_tracked.add_(1), "1.num_batches_tracked"),
        (lambda model: model[0].register_forward_hook(print), "0: hooks"),
        (lambda model: model.train(False), "attributes"),
        (lambda model: setattr(model[0], "bias", model[1].bias), "0.bias"),
        (lambda model: model.append(nn.ReLU()), "children"),
        (lambda model: setattr(model[0], "__class__", nn.Bilinear), "0: class"),
        (lambda model: model[0].weight.requires_grad_(False), "0.weight"),
    ):
        model = build()
        change(model)
        assert words in differences(portrait(model), before)
    model = build()
    objects = identities(model)
    model[0].weight = nn.Parameter(model[0].weight.detach())
    assert portrait(model) == before and identities(model) != objects


# ---------------------------------------------------------------------------------------------------------------------
# Workers.


class Planted(Kind):
    """Cases that end in every way."""

    name, about = "planted", "what a campaign must survive"
    short = long = 6
    patience = 5.0

    def run(self, index: int) -> str:
        if index == 1:
            raise Fault("planted", "seen")
        if index == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        if index == 3:
            raise KeyError("nobody expected this")
        if index == 4:
            while True:
                time.sleep(1)
        return "fine"


class Overrun(Kind):
    """A write beyond a block of the heap."""

    name, about = "overrun", "what AddressSanitizer must catch"
    short = long = 1
    sanitizer = True

    def run(self, index: int) -> str:
        buffer = ctypes.create_string_buffer(4096)
        ctypes.memset(buffer, 0, 4096 + 64)
        return "not caught"


class Crashes(Kind):
    """Nothing but crashes."""

    name, about = "crashes", "what is given up"
    short = long = 9

    def run(self, index: int) -> str:
        os.abort()


def planted() -> dict[str, Kind]:
    return {kind.name: kind for kind in (Planted(), Overrun(), Crashes())}


def run_planted(name: str, builds: Path) -> campaign.Result:
    kind = planted()[name]
    pieces = [(kind, range(kind.short))]
    return campaign.run(pieces, jobs=1, builds=builds, source=f"{__name__}:planted")[name]


def test_a_worker_that_crashes_or_hangs_is_a_fault_and_the_rest_is_tried(tmp_path):
    result = run_planted("planted", tmp_path)
    assert [o.index for o in result.outcomes] == list(range(6)) and not result.missing
    assert [o.fault for o in result.outcomes] == [
        "",
        "planted",
        "crashes: SIGSEGV",
        "an error nobody expected (KeyError)",
        "hangs (no answer within 5 s)",
        "",
    ]


def test_a_kind_that_only_crashes_is_given_up_and_says_so(tmp_path):
    result = run_planted("crashes", tmp_path)
    assert len(result.outcomes) == campaign.MOST_CRASHES
    assert result.missing == f"given up after {campaign.MOST_CRASHES} crashes"


@pytest.fixture(scope="module")
def sanitized() -> Path:
    builds = reliability.builds()
    try:
        sanitizer.build(builds)
    except NotHere as reason:
        pytest.skip(str(reason))
    return builds


def test_the_sanitizer_is_on(sanitized):
    (outcome,) = run_planted("overrun", sanitized).outcomes
    assert outcome.fault.startswith("crashes: AddressSanitizer, heap-buffer-overflow")


def test_without_a_sanitizer_the_cases_count_as_not_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "nothing")
    result = run_planted("overrun", tmp_path)
    assert not result.outcomes and result.missing == "no C compiler with AddressSanitizer"


# ---------------------------------------------------------------------------------------------------------------------
# The script.


@pytest.mark.parametrize("case", ["gradients/op:0", "op/hostile:0"])
def test_one_case_can_be_repeated(case, sanitized):
    program = [sys.executable, str(ROOT / "benchmarks" / "reliability.py"), "--case", case]
    result = subprocess.run(program, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith(f"{case}: ")


def test_a_run_writes_the_page_only_where_it_is_asked_to(tmp_path, capsys):
    output = tmp_path / "page.md"
    before = reliability.PAGE.read_text() if reliability.PAGE.exists() else None
    arguments = ["--kinds", "gradients/op", "--count", "5", "--jobs", "1"]
    assert reliability.main(arguments) == 0
    assert reliability.main([*arguments, "--output", str(output)]) == 0
    text = output.read_text()
    assert "5 attempts to break the package: **0 faults**" in text
    assert "| gradients/op |" in text and "torch" in text and "## Faults" not in text
    assert "| gradients/op |" in capsys.readouterr().out
    assert (reliability.PAGE.read_text() if reliability.PAGE.exists() else None) == before


def test_faults_and_untried_cases_stand_in_the_tables():
    kind = Planted()
    faults = [Outcome("planted", i, "fault", "broken", f"seen {i}\nand more") for i in (3, 4)]
    result = campaign.Result(9, [Outcome("planted", 0, "fine"), *faults], "no time")
    text = reliability.tables([kind], {"planted": result})
    for words in (
        "planted:3",
        "broken",
        "seen 3 and more",
        "6 cases not tried",
        "no time",
        "1 fine",
    ):
        assert words in text


def test_kinds_are_chosen_by_name_or_group(known):
    names = [kind.name for kind in reliability.choose(known, ["files", "kills"])]
    assert names == ["files", "files/overflow", "files/owned", "files/identical", "kills"]
    with pytest.raises(SystemExit, match="no kind 'nothing'"):
        reliability.choose(known, ["nothing"])
    assert reliability.choose(known, None) == list(known.values())
