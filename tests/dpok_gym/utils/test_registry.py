"""Tables of names: what may be registered, what a name stands for, and what is imported when."""

import sys
from pathlib import Path
from typing import Any

import pytest

from dpok_gym.utils.registry import Registry, import_attribute


@pytest.fixture
def registry() -> Registry[Any]:
    return Registry("reward", "Add one with register_reward().")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that says when it is imported."""
    (tmp_path / "lonely_module.py").write_text("VALUE = [1, 2]\ndef function():\n    return 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lonely_module", raising=False)
    return "lonely_module"


def test_objects(registry: Registry[Any]) -> None:
    assert registry.names() == []
    value = object()
    registry.register("second", value)
    registry.register("first", len)
    assert registry.names() == ["first", "second"]
    assert "first" in registry
    assert "third" not in registry
    assert registry.get("second") is registry.load("second") is value
    assert registry.load("first") is len


def test_places_are_imported_on_first_use(registry: Registry[Any], module: str) -> None:
    registry.register("mine", f"{module}:VALUE")
    assert registry.get("mine") == f"{module}:VALUE"
    assert "mine" in registry
    assert registry.names() == ["mine"]
    assert module not in sys.modules
    assert registry.load("mine") == [1, 2]
    assert registry.load("mine") is sys.modules[module].VALUE


def test_a_place_is_a_name_itself(registry: Registry[Any], module: str) -> None:
    assert registry.load(f"{module}:function")() == 3
    registry.register("a:b", 5)
    assert registry.load("a:b") == 5  # a registered name comes first


def test_unknown_names(registry: Registry[Any]) -> None:
    registry.register("aesthetic", 1)
    registry.register("clip", 2)
    for look_up in (registry.get, registry.load):
        with pytest.raises(ValueError, match="unknown reward 'esthetic'") as caught:
            look_up("esthetic")
        assert str(caught.value) == (
            "unknown reward 'esthetic'; did you mean 'aesthetic'? There are: aesthetic, clip. "
            "Add one with register_reward()."
        )
    for no_place in (":b", "a:"):
        with pytest.raises(ValueError, match="unknown reward"):
            registry.load(no_place)


@pytest.mark.parametrize("name", ["", "  ", 3, None])
def test_bad_names(registry: Registry[Any], name: Any) -> None:
    with pytest.raises(ValueError, match="the name of a reward must be a text that is not blank, got"):
        registry.register(name, 1)
    assert registry.names() == []


def test_a_name_stands_for_one_thing(registry: Registry[Any]) -> None:
    for first, other in ((1, 2), ("a:b", "a:c"), ("a:b", len), (len, max)):
        name = f"{first} {other}"
        registry.register(name, first)
        registry.register(name, first)
        with pytest.raises(ValueError, match=r"the reward '.*' is already registered, as .*; choose another name"):
            registry.register(name, other)
        assert registry.get(name) is first


def define() -> tuple[Any, Any]:
    """Defines a function and a class anew, as a notebook cell does when it runs again."""
    source = "def mine():\n    return 1\nclass Mine:\n    pass\n"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(source, namespace)
    return namespace["mine"], namespace["Mine"]


def test_a_definition_that_runs_again_replaces_itself(registry: Registry[Any]) -> None:
    for first, again in zip(define(), define(), strict=True):
        assert first is not again
        name = first.__name__
        registry.register(name, first)
        registry.register(name, again)
        assert registry.get(name) is again


def test_functions_in_functions_are_told_apart(registry: Registry[Any]) -> None:
    """Two lambdas have the same name, and need not do the same."""
    registry.register("mine", lambda: 1)
    with pytest.raises(ValueError, match="is already registered"):
        registry.register("mine", lambda: 2)
    assert registry.load("mine")() == 1


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("no_such_module:VALUE", "No module named 'no_such_module'"),
        ("lonely_module:NOTHING", "has no attribute 'NOTHING'"),
        ("lonely_module", "has no attribute ''"),
    ],
)
def test_places_where_nothing_is(registry: Registry[Any], module: str, place: str, reason: str) -> None:
    with pytest.raises(ImportError, match=f"the model 'mine' cannot be imported from '{place}': .*{reason}"):
        import_attribute("model 'mine'", place)
    registry.register("mine", place)
    with pytest.raises(ImportError, match="the reward 'mine' cannot be imported from"):
        registry.load("mine")


def test_import_attribute(module: str) -> None:
    assert import_attribute("value", f"{module}:VALUE") == [1, 2]
