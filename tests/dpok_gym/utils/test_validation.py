"""Checks of arguments: what passes is returned, what does not is named in the error."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dpok_gym.utils import validation as check

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(("value", "minimum"), [(1, 1), (7, 1), (0, 0), (np.int64(3), 1), (np.uint8(0), 0)])
def test_integers(value: Any, minimum: int) -> None:
    checked = check.check_integer("size", value, minimum)
    assert checked == value
    assert type(checked) is int


@pytest.mark.parametrize(
    ("value", "minimum"), [(0, 1), (-1, 0), (1.0, 1), (True, 1), ("3", 1), (None, 1), (np.float32(2), 1), (NAN, 1)]
)
def test_no_integers(value: Any, minimum: int) -> None:
    with pytest.raises(ValueError, match=f"size must be an integer of at least {minimum}, got ") as caught:
        check.check_integer("size", value, minimum)
    assert str(caught.value).endswith(repr(value))


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (check.check_non_negative, [0, 0.0, 1e-9, 7, np.float32(0.5)]),
        (check.check_positive, [1e-9, 7, INFINITY, np.float32(0.5)]),
        (check.check_fraction, [0, 1, 0.5, np.float32(0.5)]),
    ],
)
def test_numbers(function: Callable[[str, float], float], values: list[float]) -> None:
    for value in values:
        assert function("rate", value) is value


@pytest.mark.parametrize(
    ("function", "values", "message"),
    [
        (check.check_non_negative, [-1e-9, INFINITY, NAN], "rate must be a number of at least 0, got {}"),
        (check.check_positive, [0, -1, NAN, -INFINITY], "rate must be a number above 0, got {}"),
        (check.check_fraction, [-0.1, 1.1, NAN, INFINITY], "rate must lie in [0, 1], got {}"),
    ],
)
def test_numbers_out_of_range(function: Callable[[str, float], float], values: list[float], message: str) -> None:
    for value in values:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
            function("rate", value)
        assert str(caught.value) == message.format(value)


def test_choices() -> None:
    assert check.check_choice("mode", "center", True, False, "center") == "center"
    assert check.check_choice("mode", False, True, False, "center") is False
    with pytest.raises(ValueError, match="mode must be one of True, False, 'center', got 'centre'"):
        check.check_choice("mode", "centre", True, False, "center")


def test_names() -> None:
    known = ["guidance_scale", "eta", "model"]
    check.check_names("setting", [], known)
    check.check_names("setting", ["eta", "model"], known)
    with pytest.raises(ValueError, match="unknown setting 'guidance'; did you mean 'guidance_scale'") as caught:
        check.check_names("setting", ["eta", "guidance", "nonsense"], known)
    assert str(caught.value).endswith("There are: eta, guidance_scale, model")


def test_suggestions() -> None:
    assert check.suggest("kl_coeff", ["kl_coef", "eta"]) == "did you mean 'kl_coef'? There are: eta, kl_coef"
    assert check.suggest("zzz", ["kl_coef", "eta"]) == "there are: eta, kl_coef"  # nothing is near
