"""Measures of the judge and of the learned reward, by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import Evaluation
from benchmarks import judge, preference, pretrained
from dpok_gym.shapes.captions import sample_requested_scenes


def test_share_of_scenes_read_exactly() -> None:
    true, _ = sample_requested_scenes(10, torch.Generator().manual_seed(0))
    other = replace(true, colour=true.colour.clone())
    other.colour[:3, 0] += 1
    other.colour[5, -1] += 1 if true.count[5] < true.colour.shape[1] else 0  # beyond the objects there are
    assert judge.share_exact(true, true) == 1
    assert judge.share_exact(true, other) == 0.7


@pytest.mark.slow
def test_the_judge_reads_clean_scenes(capsys: pytest.CaptureFixture[str]) -> None:
    judge.main(["--images", "20"])
    (row,) = (line for line in capsys.readouterr().out.split("\n") if line.startswith("read exactly"))
    assert row.split()[2:] == ["1.0000", "1.0000"]
    with pytest.raises(SystemExit):
        judge.main(["--images", "0"])
    with pytest.raises(SystemExit):
        judge.main(["--vae", "nowhere"])


def test_area_under_the_curve() -> None:
    """Of pairs with the same prompt: here two of three, and one of one."""
    aligned = np.array([1.0, 0.5, 1.0, 1.0, 0.0])
    evaluation = Evaluation(
        prompts=["a", "a", "a", "a", "b"],
        images=np.zeros((5, 1, 1, 3), np.uint8),
        reward=aligned,
        rewards={"shapes-alignment": aligned},
        step_kl=np.zeros((5, 1)),
        step_mse=np.zeros((5, 1)),
        exploring=np.ones(1, bool),
        alignment_reward="shapes-alignment",
    )
    assert preference.area_under_curve(evaluation, np.array([3.0, 2.0, 1.0, 4.0, 9.0])) == pytest.approx(2 / 3)
    assert preference.area_under_curve(evaluation, np.zeros(5)) == 0.5  # ties count half


def test_agreement_with_what_was_chosen_and_meant() -> None:
    def row(prompt: str, preferred: int, utilities: list[float]) -> dict[str, Any]:
        return {"prompt": prompt, "preferred": preferred, "utilities": utilities, "images": ["0-1.png", "0-2.png"]}

    colour = "a red star"
    rows = [
        row(colour, 0, [1.0, 0.0]),
        row(colour, 1, [1.0, 0.0]),  # erred
        row("two red stars", 1, [0.0, 1.0]),
        row("two red stars", 1, [0.0, 1.0]),
    ]
    odds = torch.tensor([1.0, -2.0, 0.5, -1.0])  # of what was chosen
    table = preference.agreement_table(odds, rows)
    columns = [list(column.cells) for column in table.columns]
    cells = {row[0]: row[1:] for row in zip(*columns, strict=True)}
    assert cells["colour"] == ("2", "50.0%", "100.0%")
    assert cells["count"] == ("2", "50.0%", "50.0%")
    assert cells["about one scene (hard)"] == ("4", "50.0%", "75.0%")
    assert cells["all"] == ("4", "50.0%", "75.0%")


@pytest.mark.slow
def test_the_pretrained_model_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--images", "2", "--num-inference-steps", "2", "--grid", str(tmp_path / "grid.png")]
    monkeypatch.setattr("sys.argv", ["pretrained", *words])
    pretrained.main()
    rows = [line.split("│") for line in capsys.readouterr().out.split("\n") if line.startswith("│")]
    quality = {row[1].strip(): float(row[4]) for row in rows}
    assert list(quality) == ["colour", "count", "composition", "location", "all", "VAE reconstructions", "ratio"]
    mean = np.mean([quality[category] for category in list(quality)[:4]])
    assert quality["all"] == pytest.approx(mean, abs=2e-3)
    assert quality["VAE reconstructions"] > 0.9
    assert (tmp_path / "grid.png").stat().st_size > 5_000
