"""The files of choices: what is read, what is refused, and what a kill leaves behind."""

import json
from pathlib import Path

import pytest

from dpok_gym.choices.records import Choice, read_choices

GOOD = {
    "prompt": "a red star",
    "images": ["a.png", "b.png"],
    "preferred": 1,
    "who": "ada",
    "when": "2026-01-31T12:00",
}


def write(folder, rows):
    for name in ("a.png", "b.png"):
        (folder / name).touch()
    path = folder / "choices.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_choices_are_read(tmp_path):
    last = {"prompt": "other", "images": ["b.png", "a.png"], "preferred": 0, "more": 1}
    choices = read_choices(write(tmp_path, [GOOD, "\n", last]))
    images = (tmp_path / "a.png", tmp_path / "b.png")
    assert choices[0] == Choice("a red star", images, 1, who="ada", when="2026-01-31T12:00", line=1)
    assert choices[1] == Choice("other", images[::-1], 0, line=3)


def test_all_fields_come_back(tmp_path):
    images = (tmp_path / "a.png", tmp_path / "b.png")
    origins = ({"model": "shapes", "run": None, "seed": 0, "step": 0}, {"model": "shapes", "run": "r", "seed": 0})
    made = Choice(
        "a red star",
        images,
        None,
        reason="tie",
        who="ada",
        when="2026-01-31T12:00",
        left=1,
        milliseconds=900,
        id="x",
        repeat_of="w",
        sha256=("00", "11"),
        origins=origins,
        line=1,
    )
    assert read_choices(write(tmp_path, [made.to_fields(tmp_path)])) == [made]
    assert made.to_fields(tmp_path / "sub")["images"] == ["../a.png", "../b.png"]


@pytest.mark.parametrize(
    ("preferred", "reason", "outcome"),
    [(0, None, 1.0), (1, None, 0.0), (None, "tie", 0.5), (None, "both-bad", 0.5), (None, "skip", None)],
)
def test_the_outcome_of_a_choice(preferred, reason, outcome):
    assert Choice("x", (Path("a"), Path("b")), preferred, reason).outcome == outcome


def test_a_choice_that_was_taken_back_counts_no_more(tmp_path):
    rows = [GOOD | {"id": "one"}, GOOD | {"id": "two"}, {"undo": "one"}]
    assert [choice.id for choice in read_choices(write(tmp_path, rows))] == ["two"]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    path = write(tmp_path, [GOOD, json.dumps(GOOD)[:30]])
    assert len(read_choices(path)) == 1
    path = write(tmp_path, [json.dumps(GOOD)[:30] + "\n", GOOD])
    with pytest.raises(ValueError, match=r"line 1 of .* is no JSON"):
        read_choices(path)
    assert len(read_choices(write(tmp_path, [json.dumps(GOOD)]))) == 1  # whole, but without a line break


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{\n", r"line 2 of '.*choices.jsonl': it is no JSON: Expecting"),
        ("[1]\n", r"line 2 .* an object"),
        ({"version": 2}, r"line 2 .* 'version' must be 1, not 2"),
        ({"prompt": None}, r"line 2 .* 'prompt' must be a text that is not blank, not None"),
        ({"prompt": " "}, r"line 2 .* 'prompt' must be a text that is not blank"),
        ({"images": "ab"}, r"line 2 .* two different paths"),
        ({"images": ["a.png"]}, r"line 2 .* two different paths"),
        ({"images": ["a.png", "a.png"]}, r"line 2 .* two different paths"),
        ({"images": ["a.png", "c.png"]}, r"line 2 .* there is no image '.*c.png'"),
        ({"preferred": 2}, r"line 2 .* 'preferred' must be 0 .* not 2"),
        ({"preferred": True}, r"line 2 .* 'preferred' must be 0"),
        ({"preferred": None}, r"line 2 .* 'reason' must be one of tie, both-bad, skip"),
        ({"reason": "tie"}, r"line 2 .* 'preferred' is 1"),
        ({"left": 2}, r"line 2 .* 'left' must be 0 or 1"),
        ({"milliseconds": "9"}, r"line 2 .* 'milliseconds' must be an integer"),
        ({"sha256": "ab"}, r"line 2 .* 'sha256' must be two texts"),
        ({"origins": [1, 2]}, r"line 2 .* 'origins' must be two objects"),
        ({"who": 3}, r"line 2 .* 'who' must be a text"),
        ({"when": "yesterday"}, r"line 2 .* 'when' must be a time in ISO 8601.*'yesterday'"),
        ({"undo": 3}, r"line 2 .* 'undo' must be a text"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path, change, message):
    row = change if isinstance(change, str) else GOOD | change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_choices(write(tmp_path, [GOOD, row, GOOD]))


def test_missing_fields_and_files(tmp_path):
    path = write(tmp_path, [{name: value for name, value in GOOD.items() if name != "preferred"}])
    with pytest.raises(ValueError, match=r"line 1 .* 'preferred' is missing"):
        read_choices(path)
    path.write_bytes(b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*can't decode"):
        read_choices(path)
    with pytest.raises(FileNotFoundError, match="no file of choices at"):
        read_choices(tmp_path / "none.jsonl")
