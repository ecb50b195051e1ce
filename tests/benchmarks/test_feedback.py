"""The benchmark of learning from choices: its choices, its runs, its table and its figure."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import feedback, feedback_report, runs
from benchmarks.runs import HERE
from dpok_gym.choices.records import read_choices
from tests.benchmarks.support import RESULTS, values

SETTINGS = yaml.safe_load((HERE / "feedback.yaml").read_text(encoding="utf-8"))
COMMON = SETTINGS["common"] | {"num_inference_steps": 1, "eval_images": 2}
#: Runs of a few seconds.
TINY = SETTINGS | {
    "common": COMMON,
    "seeds": 1,
    "error_rates": [0.2],
    "choices": [20, 25],
    "ways": {
        "DPOK": {"fit": {"epochs": 1, "held_out": 0.2}, "images": 2, "images_per_iteration": 2, "use_critic": False},
        "best of 2": {"fit": {"epochs": 1, "held_out": 0.2}, "n": 2},
        "Diffusion-DPO": {"batch_size": 16, "epochs": 1},
    },
}


def test_descriptions() -> None:
    descriptions = list(feedback.descriptions(SETTINGS))
    assert len({json.dumps(each, sort_keys=True) for each in descriptions}) == len(descriptions) == 5 * (1 + 3 * 4 * 3)
    assert {each["label"] for each in descriptions} == SETTINGS["seconds"].keys()


def test_the_settings_were_tuned() -> None:
    """On choices that the comparison does not have, each way by as many runs."""
    descriptions = list(feedback.tuning(SETTINGS))
    changes = SETTINGS["tuning"]["changes"]
    assert SETTINGS["tuning"]["seed"] >= SETTINGS["seeds"]
    assert len({json.dumps(each, sort_keys=True) for each in descriptions}) == len(descriptions)
    assert len({len(each) for each in changes.values()}) == 1


@pytest.mark.parametrize("way", SETTINGS["tuning"]["changes"])
@pytest.mark.parametrize(("n_choices", "tuned_with"), [(50, 50), (100, 50), (200, 400), (400, 400)])
def test_the_published_tuning(way: str, n_choices: int, tuned_with: int) -> None:
    """Each way has the settings whose images the person likes best; of those liked equally, the lowest KL."""
    descriptions = list(feedback.tuning(SETTINGS))
    records = [record for record in runs.find_records(descriptions, RESULTS / "feedback" / "tuning.jsonl") if record]
    assert len(records) == len(descriptions)
    of_way = [r for r in records if r["label"].startswith(way) and r["choices"] == tuned_with]
    liked = [r["scores"]["alignment"] + 0.2 * r["scores"]["quality"] for r in of_way]
    nearly_best = [r for r, value in zip(of_way, liked, strict=True) if value > max(liked) - 0.01]
    best = min(nearly_best, key=lambda r: r["scores"]["kl"])
    assert feedback.own_settings(SETTINGS["ways"][way], n_choices) == best["settings"]


def test_the_ranking(capsys: pytest.CaptureFixture[str]) -> None:
    """The best run of each number of choices comes first."""
    records = [
        {"label": label, "choices": n, "scores": {"alignment": alignment, "quality": quality, "aligned": 0, "kl": 1}}
        for label, n, alignment, quality in [("a", 50, 0.5, 0.1), ("b", 50, 0.45, 0.9), ("a", 400, 0.6, 0.5)]
    ]
    feedback_report.rank(records)
    rows = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [["b", "0.630"], ["a", "0.520"], ["a", "0.700"]]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
def test_choices_and_runs(tmp_path: Path) -> None:
    """More choices begin with the fewer ones, and no image is in two of them."""
    feedback.draw_choices(tmp_path, TINY, 0)
    few, more = (read_choices(feedback.choices_file(tmp_path, 0, 0.2, n)) for n in TINY["choices"])
    assert (len(few), more[:20]) == (20, few)
    assert len({image for choice in more for image in choice.images}) == 50
    before = feedback.choices_file(tmp_path, 0, 0.2, 20).stat().st_mtime_ns
    feedback.draw_choices(tmp_path, TINY, 0)
    assert feedback.choices_file(tmp_path, 0, 0.2, 20).stat().st_mtime_ns == before
    records = {}
    for description in feedback.descriptions(TINY | {"choices": [20]}):
        record = feedback.run(description, work=tmp_path)
        assert record.items() >= description.items()
        assert all(0 <= record["scores"][name] <= 1 for name in ("aligned", "quality"))
        records[record["label"]] = record
    assert records["DPOK"]["agreement"] == records["best of 2"]["agreement"]  # of one reward
    assert len(list((tmp_path / "seed-0").glob("*.pt"))) == 1
    assert "agreement" not in records["Diffusion-DPO"]
    assert records["Diffusion-DPO"]["scores"]["kl"] > 0
    assert records["best of 2"]["scores"]["kl"] == pytest.approx(np.log(2) - 0.5)
    assert records["pre-trained"]["scores"]["kl"] == 0


@pytest.mark.slow
def test_report(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = []
    for description in feedback.descriptions(SETTINGS):
        scores = {name: rng.random() for name in ("aligned", "quality", "kl")}
        records.append(description | {"scores": scores, "seconds": 12.0})
    feedback_report.report(records, SETTINGS["targets"], tmp_path)
    parts = (tmp_path / "table.md").read_text().split("## ")[1:]
    assert [part.partition(" ")[0] for part in parts] == ["Choices", "5%", "10%", "20%"]
    (row,) = (line for line in parts[2].split("\n") if line.startswith("| Diffusion-DPO, 200 |"))
    ours = [
        r["scores"]["aligned"]
        for r in records
        if (r["label"], r["error_rate"], r["choices"]) == ("Diffusion-DPO", 0.1, 200)
    ]
    assert values(row)[0] == f"{np.mean(ours):.3f}"
    assert (tmp_path / "feedback.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_published_table_is_rebuilt(tmp_path: Path) -> None:
    """Of the lines of all runs."""
    folder = RESULTS / "feedback"
    descriptions = list(feedback.descriptions(SETTINGS))
    records = [record for record in runs.find_records(descriptions, folder / "runs.jsonl") if record]
    assert len(records) == len(descriptions)
    feedback_report.report(records, SETTINGS["targets"], tmp_path)
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()


def test_the_choices_that_are_needed() -> None:
    """The fewest ones after which the mean over the seeds is high enough."""
    records = [
        {"label": "a", "error_rate": 0.1, "choices": n, "scores": {"aligned": share}}
        for n, share in [(50, 0.6), (50, 0.7), (100, 0.6), (100, 0.8), (200, 0.9)]
    ]
    cells, headings = feedback_report.make_prices({0.1: records}, [0.7, 0.8, 0.95])
    assert headings == ["70% aligned, 10% errors", "80% aligned, 10% errors", "95% aligned, 10% errors"]
    assert cells == {"a": ["100", "200", "more than 200"]}
