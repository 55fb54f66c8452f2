"""The registry: which type becomes which, and integrations that are loaded when a type of theirs is met."""

import sys
import types

import pytest
from torch import nn

from torchao_superblock.bsr import BSRLinear
from torchao_superblock.bsr.layers import INTEGRATIONS, twin_of
from torchao_superblock.common.swappable import TWINS, own_methods, type_obstacle


class Foreign(nn.Linear):
    """As if another library had brought it."""

    def forward(self, x):
        return super().forward(x)


Foreign.__module__ = "some_library.layers"


def test_exact_types_only():
    assert twin_of(nn.Linear).bsr is BSRLinear
    assert twin_of(type("Mine", (nn.Conv2d,), {})) is None
    assert type_obstacle(nn.Linear, "weight") is None
    assert "bias" in type_obstacle(nn.Linear, "bias")
    assert "no block-sparse twin" in type_obstacle(nn.Conv1d, "weight")


def test_a_linear_layer_without_methods_of_its_own_is_one():
    class Initialised(nn.Linear):
        """Begins with another distribution, and prints another name."""

        gain: float = 0.02

        def reset_parameters(self):
            nn.init.trunc_normal_(self.weight, std=self.gain)

        def extra_repr(self):
            return "initialised"

    class Deeper(Initialised):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    for cls in (Initialised, Deeper):
        assert twin_of(cls) is twin_of(nn.Linear)
        assert type_obstacle(cls, "weight") is None

    class Mixin:
        def lora_parameters(self):
            return []

    def forward(self, x):
        return x

    own = {
        "forward": {"forward": forward},
        "a method": {"merge": forward},
        "a property": {"weight": property(lambda self: self.v)},
        "a static method": {"cast": staticmethod(len)},
        "__call__": {"__call__": forward},
        "loading": {"_load_from_state_dict": forward},
    }
    for namespace in own.values():
        cls = type("Mine", (Initialised,), namespace)
        assert twin_of(cls) is None
        assert own_methods(cls) == list(namespace)
    for bases in ((Mixin, nn.Linear), (nn.Linear, Mixin)):
        assert own_methods(type("Mine", bases, {})) == ["lora_parameters"]


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
