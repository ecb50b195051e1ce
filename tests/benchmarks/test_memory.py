"""The benchmark of the expected memory, with a tiny model."""

import json
from pathlib import Path

import pytest

from benchmarks.memory import expect, main, measure


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "xl"])
def test_the_tensors_are_those_expected(family: str, request: pytest.FixtureRequest) -> None:
    """The process takes far more: a tiny model is nothing beside the libraries' own memory."""
    folder = str(request.getfixturevalue(f"tiny_{family}_folder"))
    for checkpoints in (False, True):
        measured = measure(folder, "bfloat16", checkpoints, 2, 5.0)
        assert expect(folder, "bfloat16", checkpoints, 2, 5.0) == pytest.approx(measured["tensors"], rel=0.05)


@pytest.mark.slow
def test_a_row(tiny_sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memory.json"
    one_row = ["--dtypes", "float32", "--checkpointing", "0", "--micro-batch-sizes", "1"]
    main(["--model", str(tiny_sd_folder), *one_row, "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["expected"] / row["process"] == row["ratio"]
    assert 0 < row["tensors"] < row["process"]
    assert f"{row['ratio']:.2f}" in capsys.readouterr().out
