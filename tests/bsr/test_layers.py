"""The registry: which type becomes which, and integrations that are loaded when a type of theirs is met."""

import sys
import types

import pytest
import torch
from torch import nn

from tests.bsr.common import prune
from torchao_superblock import load_bsr, save_bsr, swap_to_bsr, swap_to_dense
from torchao_superblock.bsr import BSRLinear
from torchao_superblock.bsr.layers import INTEGRATIONS, register_twin, twin_of
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


class Initialised(nn.Linear):
    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


def test_subclasses_at_the_swap_and_back():
    class Written(nn.Linear):
        def forward(self, x):
            return x @ self.weight.mT + self.bias

    class Adapted(Initialised):
        def __init__(self, *args):
            super().__init__(*args)
            self.lora = nn.Linear(64, 64)

    class Counted(Initialised):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("calls", torch.zeros(()))

    def build() -> nn.ModuleDict:
        classes = {"initialised": Initialised, "written": Written}
        classes |= {"adapted": Adapted, "counted": Counted}
        torch.manual_seed(0)
        return nn.ModuleDict({name: prune(cls(64, 64), 16) for name, cls in classes.items()})

    model, x = build(), torch.randn(3, 64)
    expected = {name: model[name](x) for name in ("initialised", "written")}
    report = swap_to_bsr(model, 16, min_sparsity=0.5)
    assert [entry.fqn for entry in report.swapped] == ["initialised"]
    skipped = {entry.fqn: (entry.code, entry.reason) for entry in report.skipped}
    assert skipped["written"][0] == "linear_subclass" and "(forward)" in skipped["written"][1]
    assert skipped["adapted"] == ("customised", skipped["adapted"][1])
    assert skipped["counted"] == ("customised", skipped["counted"][1])
    assert (
        "lora of its own" in skipped["adapted"][1] and "calls of its own" in skipped["counted"][1]
    )
    register_twin(Written, BSRLinear, "weight")
    try:
        report = swap_to_bsr(model, 16, min_sparsity=0.5)
        assert [entry.fqn for entry in report.swapped] == ["written"]
        for name, y in expected.items():
            assert type(model[name]) is BSRLinear
            torch.testing.assert_close(model[name](x), y)
        assert swap_to_dense(model) == ["initialised", "written"]
        assert type(model["initialised"]) is type(model["written"]) is nn.Linear
        torch.testing.assert_close(model["written"](x), expected["written"])
    finally:
        TWINS.pop(Written)


def test_files_are_loaded_into_subclasses(tmp_path):
    model = nn.Sequential(prune(Initialised(64, 64), 16))
    swap_to_bsr(model, 16, min_sparsity=0.5)
    save_bsr(model, tmp_path / "m")
    other = load_bsr(nn.Sequential(Initialised(64, 64)), tmp_path / "m")
    assert torch.equal(other[0].values, model[0].values)


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
