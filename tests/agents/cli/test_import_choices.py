"""``dpok import-choices`` and ``dpok export-choices``."""

import json

import pytest

from agents.cli.main import main
from benchmarks.kill import make_choices
from dpok_gym.choices.records import read_choices


@pytest.fixture
def choices(tmp_path):
    """Forty choices of the brighter image of two, and a tie."""
    (tmp_path / "here").mkdir()
    path = make_choices(tmp_path / "here")
    with path.open("a") as file:
        tie = {"prompt": "a day", "images": ["0-a.png", "0-b.png"], "preferred": None, "reason": "tie", "who": "ada"}
        file.write("\n" + json.dumps(tie) + "\n")
    return path


def table_rows(text):
    lines = [line.strip("│ ").split("│") for line in text.splitlines() if line.count("│") == 3]
    return {name.strip(): number.strip() for name, number in lines}


def test_export_and_import(choices, tmp_path, capsys):
    words = ["--format", "pick-a-pic", "--out"]
    assert main(["export-choices", str(choices), *words, str(tmp_path / "there")]) == 0
    rows = table_rows(capsys.readouterr().out)
    assert (rows["choices"], rows["ties among them"], rows["images"]) == ("41", "1", "80")
    assert main(["import-choices", str(tmp_path / "there"), *words, str(tmp_path / "back")]) == 0
    printed = capsys.readouterr().out
    assert table_rows(printed) == rows | {"images": "69"}  # of each content one is kept
    assert f"dpok fit-reward {tmp_path / 'back' / 'choices.jsonl'}" in printed
    back = read_choices(tmp_path / "back" / "choices.jsonl")
    assert [choice.outcome for choice in back] == [choice.outcome for choice in read_choices(choices)]


def test_what_was_left_out_is_said(choices, tmp_path, capsys):
    words = ["export-choices", str(choices), "--format", "hpdv2", "--out", str(tmp_path / "there")]
    assert main(words) == 0
    rows = table_rows(capsys.readouterr().out)
    assert (rows["choices"], rows["left out: ties, which this format cannot hold"]) == ("40", "1")
    assert main(words) == 2
    assert "is not empty; choose another one" in capsys.readouterr().err


def test_mistakes_leave_nothing(tmp_path, capsys):
    (tmp_path / "train.json").write_text('[{"prompt": "a cat"}]')
    words = ["import-choices", str(tmp_path / "train.json"), "--format", "hpdv2", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "row 1 of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["import-choices", str(tmp_path / "train.json"), "--format", "hpd", "--out", "x"]) == 2
    assert "did you mean 'hpdv2'?" in capsys.readouterr().err
