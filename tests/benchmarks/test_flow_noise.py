"""The benchmark of exploration noise: its runs, its tables and its figure."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import flow_noise, runs
from benchmarks.flow_noise import COLUMNS
from benchmarks.runs import HERE
from dpok_gym.samplers.flow_matching import KERNELS
from tests.benchmarks.support import RESULTS, fake_records, mean_score, values

SETTINGS = yaml.safe_load((HERE / "flow_noise.yaml").read_text(encoding="utf-8"))


def test_descriptions() -> None:
    descriptions = list(flow_noise.descriptions(SETTINGS))
    assert len({json.dumps(description, sort_keys=True) for description in descriptions}) == len(descriptions)
    assert all(description.keys() >= {"task", "label", "seed"} for description in descriptions)  # for their names
    assert set(SETTINGS["samplers"]) == set(KERNELS)
    # Every kernel trains but the one without noise, which has no densities.
    trained = {each["environment"]["sampler"] for each in descriptions if each["algorithm"] == "dpok"}
    assert trained == set(KERNELS) - {"ode"}


@pytest.mark.slow
def test_report(tmp_path: Path) -> None:
    records = fake_records(list(flow_noise.descriptions(SETTINGS)))
    flow_noise.report(records, SETTINGS, tmp_path)
    of_ten_steps, of_twenty_steps = (tmp_path / "table.md").read_text().split("## 20 steps")
    for n_steps, text in ((10, of_ten_steps), (20, of_twenty_steps)):
        (row,) = (line for line in text.split("\n") if line.startswith("| cps, 0.8 |"))
        ours = [r for r in records if r["label"] == "cps, 0.8" and r["num_inference_steps"] == n_steps]
        means = []
        rate = SETTINGS["settings"]["learning_rate"]
        moments = {"before": None, "after": rate, "slower": SETTINGS["slower"]["learning_rate"]}
        for when, name, format_spec in COLUMNS.values():
            chosen = [record for record in ours if record["settings"].get("learning_rate") == moments[when]]
            if chosen:  # the last columns are empty where there is no such run
                means.append(f"{mean_score(chosen, 'training', name):{format_spec}}")
        assert values(row) == means
        (row,) = (line for line in text.split("\n") if line.startswith("| ode |"))
        assert len(values(row)) == 3  # the others are empty
    assert (tmp_path / "flow_noise.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_published_table_is_rebuilt(tmp_path: Path) -> None:
    """Of the lines of all runs."""
    folder = RESULTS / "flow_noise"
    descriptions = list(flow_noise.descriptions(SETTINGS))
    records = [record for record in runs.find_records(descriptions, folder / "runs.jsonl") if record]
    assert len(records) == len(descriptions)
    flow_noise.report(records, SETTINGS, tmp_path)
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()
