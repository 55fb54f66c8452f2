"""The registry: which type becomes which, and integrations that are loaded when a type of theirs is met."""

import sys
import types

import pytest
from torch import nn

from torchao_superblock.bsr import BSRLinear
from torchao_superblock.bsr.layers import INTEGRATIONS, twin_of
from torchao_superblock.common.swappable import TWINS, type_obstacle


class Foreign(nn.Linear):
    """As if another library had brought it."""


Foreign.__module__ = "some_library.layers"


def test_exact_types_only():
    assert twin_of(nn.Linear).bsr is BSRLinear
    assert twin_of(type("Mine", (nn.Linear,), {})) is None
    assert type_obstacle(nn.Linear, "weight") is None
    assert "bias" in type_obstacle(nn.Linear, "bias")
    assert "no block-sparse twin" in type_obstacle(nn.Conv2d, "weight")


def test_an_integration_is_imported_when_a_class_of_its_library_is_met(monkeypatch, tmp_path):
    (tmp_path / "an_integration.py").write_text(
        "import some_library\n"
        "from torchao_superblock.bsr import BSRLinear\n"
        "from torchao_superblock.common.swappable import register_twin\n"
        "register_twin(some_library.Foreign, BSRLinear, 'weight')\n",
        encoding="utf-8",
    )
    library = types.ModuleType("some_library")
    library.Foreign = Foreign
    monkeypatch.setitem(sys.modules, "some_library", library)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(INTEGRATIONS, "some_library", "an_integration")
    try:
        assert Foreign not in TWINS
        assert twin_of(nn.Linear) is not None and "an_integration" not in sys.modules
        assert twin_of(Foreign).bsr is BSRLinear
        assert "an_integration" in sys.modules
    finally:
        TWINS.pop(Foreign, None)
        sys.modules.pop("an_integration", None)


def test_an_integration_that_cannot_be_imported_is_no_obstacle(monkeypatch):
    monkeypatch.setitem(INTEGRATIONS, "some_library", "a_module_that_is_not_there")
    with pytest.warns(
        UserWarning, match="some_library and this package .* No module named 'a_module_that"
    ):
        assert twin_of(Foreign) is None
