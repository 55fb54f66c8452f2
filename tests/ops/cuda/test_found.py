"""What tuning found outlives a process, and is never trusted blindly."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

from tests.ops.cuda.common import H200, problem
from torchao_superblock.ops.cuda import choose, found
from torchao_superblock.ops.cuda.choose import Choice
from torchao_superblock.ops.cuda.tiles import HopperTile

ASKED = problem(50432, 3072, 768, 64, 0.1)
KEY = choose.tuning_key(ASKED)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found.forget(), choose.forget()
    yield
    found.forget(), choose.forget()


def keep(choice: Choice) -> None:
    """As tuning does, and then a new process begins."""
    found.adopt(H200, KEY, choose.to_json(choice))
    found.save(H200, [KEY])
    found.forget(), choose.forget()


def test_a_choice_is_used_in_the_next_process_by_what_it_is_good_for() -> None:
    rule = choose.choose(ASKED)
    other = next(c for c in choose.candidates(ASKED) if c.kernel == "hopper" and c != rule)
    plain = choose.plain(ASKED)
    for choice in (other, plain):
        keep(choice)
        assert choose.choose(ASKED) == choice
        # Also for other numbers of tokens in its bucket; not for another activation, or for a gradient of that shape.
        assert choose.choose(ASKED._replace(M=40_000)) == choice
        gradient = ASKED._replace(kind="grad_x")
        for different in (ASKED._replace(activation="gelu"), gradient, ASKED._replace(M=20_000)):
            assert choose.choose(different) == choose.by_rule(different)
        # A call that the Gluon kernel cannot serve is another kind.
        unaligned = ASKED._replace(aligned=(False, True))
        assert choose.choose(unaligned) == choose.plain(unaligned)


def test_files_are_of_one_card_and_version() -> None:
    keep(choose.plain(ASKED))
    other_card = ASKED._replace(device=H200._replace(name="another / card"))
    assert choose.choose(other_card) == choose.by_rule(other_card)
    path = found.cache_file(other_card.device)
    assert path.parent == found.cache_file(H200).parent and path != found.cache_file(H200)
    second = ASKED._replace(device=H200._replace(index=1))
    assert choose.choose(second) == choose.plain(ASKED)


@pytest.mark.parametrize("case", ["text", "empty", "foreign", "old", "entry", "deep"])
def test_a_foreign_or_corrupt_file_is_ignored_with_a_warning(case: str) -> None:
    keep(choose.plain(ASKED))
    path = found.cache_file(H200)
    content = json.loads(path.read_text())
    text = {
        "text": "not json",
        "empty": json.dumps({"format": found.FORMAT}),
        "foreign": json.dumps(content | {"device": "another GPU"}),
        "old": json.dumps(content | {"format": found.FORMAT - 1}),
        "entry": json.dumps(content | {"entries": [{"for": 3}]}),
        "deep": "[" * 100_000,
    }[case]
    path.write_text(text)
    with pytest.warns(UserWarning, match="tuning results.*ignored") as caught:
        assert choose.choose(ASKED) == choose.by_rule(ASKED)
        assert choose.choose(ASKED._replace(M=60_000)).kernel == "hopper"
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    # The next tuning replaces it.
    with warnings.catch_warnings(action="error"):
        keep(choose.plain(ASKED))
        assert choose.choose(ASKED) == choose.plain(ASKED)


def test_a_choice_of_another_version_is_passed_over_and_others_stay() -> None:
    other = ASKED._replace(activation="relu")
    kept = choose.plain(other)
    found.adopt(H200, choose.tuning_key(other), choose.to_json(kept))
    found.save(H200, [choose.tuning_key(other)])
    keep(Choice("hopper", HopperTile(64, 7)))
    with pytest.warns(UserWarning, match="passed over.*is not a tile of this version") as caught:
        assert choose.choose(ASKED) == choose.by_rule(ASKED)
        assert choose.choose(ASKED._replace(M=60_000)) == choose.by_rule(ASKED._replace(M=60_000))
    assert len(caught) == 1
    assert choose.choose(other) == kept


def test_saving_adds_to_what_is_there() -> None:
    keep(choose.plain(ASKED))
    other = choose.tuning_key(ASKED._replace(activation="relu"))
    found.adopt(H200, other, {"any": "thing"})
    found.save(H200, [other])
    found.forget()
    assert found.lookup(H200, KEY) == choose.to_json(choose.plain(ASKED))
    assert found.lookup(H200, other) == {"any": "thing"}
    assert not list(found.cache_file(H200).parent.glob("*.tmp"))
