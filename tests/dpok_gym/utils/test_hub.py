"""What is missing in a model's files; the models' tests see it in whole models."""

from types import SimpleNamespace

import pytest

from dpok_gym.utils.hub import describe_wrong_weights, has_vocabulary


@pytest.mark.parametrize(
    ("missing", "mismatched", "expected"),
    [
        ([], [], ""),
        (["b"], [], "lacks 1 weights or has them in another shape, such as b"),
        ({"b", "a"}, [("c", (1,), (2,))], "lacks 3 weights or has them in another shape, such as a, b, c"),
        ([], ["d", "c", "b", "a"], "lacks 4 weights or has them in another shape, such as a, b, c"),
    ],
)
def test_wrong_weights(missing: object, mismatched: object, expected: str) -> None:
    assert describe_wrong_weights({"missing_keys": missing, "mismatched_keys": mismatched}) == expected


@pytest.mark.parametrize(("size", "expected"), [(0, False), (2, False), (3, True), (49408, True)])
def test_vocabulary(size: int, expected: bool) -> None:
    """The special tokens alone make no vocabulary, though one of them may have several roles."""
    tokenizer = SimpleNamespace(vocab_size=size, all_special_ids=[0, 1, 1])
    assert has_vocabulary(tokenizer) is expected
