"""Options that are made from constructors' arguments."""

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from agents.cli.arguments import (
    UsageError,
    clean_docstring,
    format_reward,
    given,
    kinds_of_options,
    make_options,
    parse_options,
)
from agents.cli.option_types import parse_mapping
from agents.common.arguments import describe_arguments


class Learner:
    """Learns.

    Args:
        rate: a rate, see :class:`~agents.Learner`, above 0.
        size: how much, ``None`` for all.
        fits: the number "auto" finds.
        mode: a mode.
        flag: switches it on.
        either: true, false or the middle.
        layers: names.
        widths: of each layer.
        shape: height and width.
        sides: the same.
        extra: more.
        reward: what is rewarded.
        optimizer: a class, which no text can express.
    """

    def __init__(
        self,
        rate: float | Callable[[float], float] = 1e-3,
        size: int | None = None,
        fits: int | Literal["auto"] | None = 128,
        mode: Literal["loss", "reward"] = "loss",
        flag: bool = False,
        either: bool | Literal["center"] = True,
        layers: str | Sequence[str] = "attention",
        widths: tuple[int, ...] | None = (8, 16),
        shape: int | tuple[int, int] | None = None,
        sides: int | Sequence[int] | None = None,
        extra: Mapping[str, Any] | None = None,
        reward: Callable[..., Any] | Mapping[str, float] | str = "bright",
        optimizer: type = dict,
        schedule: Callable[[float], float] | None = None,
    ) -> None:
        pass


def _options(**changes):
    described = describe_arguments(Learner)
    defaults = {name: argument.default for name, argument in described.items()} | changes
    return make_options("learner", described.values(), defaults)


def _parse(*words, **changes):
    return vars(parse_options(_options(**changes), "learn", words))


def test_the_defaults_come_through():
    assert _parse() == {
        "rate": 1e-3,
        "size": None,
        "fits": 128,
        "mode": "loss",
        "flag": False,
        "either": True,
        "layers": "attention",
        "widths": (8, 16),
        "shape": None,
        "sides": None,
        "extra": None,
        "reward": "bright",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--rate 3e-4", "rate", 3e-4),
        ("--rate 1", "rate", 1.0),
        ("--size 8", "size", 8),
        ("--size None", "size", None),
        ("--fits auto", "fits", "auto"),
        ("--fits None", "fits", None),
        ("--mode reward", "mode", "reward"),
        ("--flag", "flag", True),
        ("--no-flag", "flag", False),
        ("--either center", "either", "center"),
        ("--either False", "either", False),
        ("--layers all", "layers", "all"),
        ("--layers to_q to_k", "layers", ("to_q", "to_k")),
        ("--widths 4 2 1", "widths", (4, 2, 1)),
        ("--widths None", "widths", None),
        ("--shape 64", "shape", 64),
        ("--shape 64 128", "shape", (64, 128)),
        ("--sides 64", "sides", 64),
        ("--sides 64 128", "sides", (64, 128)),
        ("--sides None", "sides", None),
        ("--widths 4", "widths", (4,)),
        ("--extra vae_tiling=true revision=main limit=1e-3 none=null", "extra", None),
        ("--reward a=2,b", "reward", "a=2,b"),
    ],
)
def test_types(words, name, value):
    if name == "extra":
        value = {"vae_tiling": True, "revision": "main", "limit": 1e-3, "none": None}
    parsed = _parse(*words.split(), size=3, flag=True)[name]
    assert parsed == value
    assert type(parsed) is type(value)


def test_mappings():
    assert parse_mapping(['{"a": [1, 2], b: c}']) == {"a": [1, 2], "b": "c"}
    assert parse_mapping([]) == {}
    for wrong in ("a", "=1", "{a", "a=["):
        with pytest.raises(ValueError, match=r"write NAME=VALUE|cannot be read"):
            parse_mapping([wrong])


def test_help_has_the_docstrings_and_the_resolved_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        _parse("--help", rate=0.25, reward={"a": 1.0, "b": 0.5}, extra={"dtype": "bfloat16"})
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A rate, see Learner, above 0. (default: 0.25)" in text
    assert "How much, None for all." in text
    assert "(default: a=1.0,b=0.5)" in text
    assert "(default: dtype=bfloat16)" in text
    assert "optimizer" not in text  # a command line cannot express it
    assert "schedule" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rat 1", "unknown option --rat; did you mean '--rate'?"),
        ("--modee=loss", "unknown option --modee; did you mean '--mode'?"),
        ("--xyzzy 1", "unknown option --xyzzy; the option --help lists all of them"),
        ("green squares", "unexpected 'green': a text of several words needs quotation marks"),
        ("--size eight", "size"),
        ("--mode gain", "gain"),
        ("--rate", "--rate needs a value"),
        ("--extra a", "write NAME=VALUE, not 'a'"),
    ],
)
def test_errors_are_one_line(words, message, capsys):
    with pytest.raises(UsageError) as caught:
        _parse(*words.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not set("╭╮╰╯│─") & set(str(caught.value))
    assert capsys.readouterr().err == ""


def test_names_of_options():
    @dataclass
    class Outer:
        first_one: int = 0

    assert list(kinds_of_options(Outer)) == ["--first-one"]
    assert list(kinds_of_options(_options()))[:2] == ["--rate", "--size"]


def test_docstrings_lose_their_marks():
    text = "the ``x`` of :class:`~agents.common.policy.DenoisingPolicy`, see :func:`evaluate`"
    assert clean_docstring(text) == "The x of DenoisingPolicy, see evaluate"


def test_rewards_are_written_as_they_are_read():
    assert format_reward("a=2,b") == "a=2,b"
    assert format_reward({"a": 1.0, "b": 0.1}) == "a=1.0,b=0.1"
    assert format_reward({"a": {"weight": 2.0, "normalize": [0.0, 1.0]}}) == "a=2.0"


def test_given_leaves_none_out():
    assert given(types.SimpleNamespace(a=1, b=None, c=0), "a", "b", "c") == {"a": 1, "c": 0}
