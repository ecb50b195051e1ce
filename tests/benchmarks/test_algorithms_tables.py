"""The tables of the comparison: what is computed from the runs, and what is shown."""

import hashlib
import itertools
import re
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks import algorithms, algorithms_records, algorithms_tables
from benchmarks.algorithms import Tuning
from benchmarks.algorithms_records import PRETRAINED
from benchmarks.runs import HERE, Record, read_records
from benchmarks.training_run import UNTRAINED
from tests.benchmarks.support import points, values

SETTINGS = yaml.safe_load((HERE / "algorithms.yaml").read_text(encoding="utf-8"))
TASKS = ("one", "two")


def record(task: str, label: str, seed: int, aligned: float, **changes: Any) -> Record:
    """Returns a run whose reward and verdict are its aligned share."""
    scores = {
        "aligned": aligned,
        "alignment": aligned,
        "quality": 0.9,
        "reward": aligned,
        "reward_std": 0.5,
        "kl": 10 * aligned,
        "late_drift": 0.125,
        "calls": 10,
        "reward_calls": 1,
        "seconds": 0.25,
    }
    scores |= {"judged": aligned, "judged_std": 0.25, "entropy_of_positions": 3.0, "diversity": 0.2}
    run: Record = {"task": task, "label": label, "seed": seed, "reward": {"shapes-preference": 1.0}}
    run["algorithm"] = UNTRAINED if label == PRETRAINED else "dpok"
    results = {"curve": [], "seconds": 5.0, "num_function_evaluations": 1000, "num_gradient_evaluations": 500}
    return run | results | {"scores": {"training": scores}, "num_function_evaluations_to_draw": 10} | changes


def test_a_row_of_a_task() -> None:
    records = [record("one", PRETRAINED, 0, 0.5)] + [record("one", "ours", seed, 0.7 + seed / 10) for seed in (1, 0)]
    records[1]["scores"]["training"]["judged"] = 0.5
    table = algorithms_tables.task_table(records, "one", ["ours", PRETRAINED, "absent"])
    ours, before = table.splitlines()[2:]
    # The reward has risen by 0.2 and 0.3, which is 0.4 and 0.6 spreads; the verdict by 0.8 spreads, and by none.
    cells = ["75.0", "0.900", "0.75", "7.5", "0.12", "3.00", "0.200", "2", "10", "5", "+0.10", "70 80"]
    assert values(ours) == cells
    assert "75.0 [70.0, 80.0]" in ours
    assert values(before)[-2:] == ["+0.00", "50"]
    for run in records:
        run["reward"] = {"benchmarks.sparse_reward:fully_aligned": 2.0}  # the judge itself
        del run["scores"]["training"]["kl"]  # drawn in a way whose KL is not known: nor is the drift
    (ours,) = algorithms_tables.task_table(records, "one", ["ours"]).splitlines()[2:]
    assert values(ours) == [*cells[:3], "", "", *cells[5:-2], "", cells[-1]]


def test_gains_are_above_the_pretrained_model() -> None:
    records = [record(task, PRETRAINED, seed, 0.4) for task in TASKS for seed in (0, 1)]
    records += [record("one", "ours", 0, 0.5), record("one", "ours", 1, 0.7), record("two", "ours", 0, 0.3)]
    records += [record("one", "half", 0, 0.5)]
    records[-3] |= {"diverged": "nan", "scores": {}}  # the seed of 0.7: no image is aligned
    by_label = algorithms_records.gains(records, TASKS, ["ours", "half", PRETRAINED])
    assert by_label.keys() == {"ours", PRETRAINED}  # the other one has no run on a task
    np.testing.assert_allclose(by_label["ours"][0], [10, -40])
    np.testing.assert_allclose(by_label["ours"][1], [-10])
    row = algorithms_tables.overview(records, TASKS, ["ours"]).splitlines()[2]
    assert values(row)[:2] == ["3", "-12.5"]


def test_a_difference_that_can_be_told_from_noise_is_bold() -> None:
    rng, records = np.random.default_rng(0), []
    for task in TASKS:
        for seed in range(8):
            records.append(record(task, PRETRAINED, seed, 0.4))
            for label, level in (("good", 0.8), ("same", 0.8), ("bad", 0.5)):
                records.append(record(task, label, seed, level + rng.normal(0, 0.02)))
    good, same, bad = algorithms_tables.pairs_table(records, TASKS, ["good", "same", "bad"]).splitlines()[2:]
    assert good.count("**") == same.count("**") == 2
    assert bad.count("**-") == 2


def test_a_row_of_a_long_run() -> None:
    """A curve is smoothed over a twentieth of its points, here over three; a method that fits has none on the way."""
    before = record("one", PRETRAINED, 0, 0.5)
    rewards = [0.5, *np.linspace(0.5, 0.89, 40), *[0.9] * 20]
    ours = record("long", "ours", 0, 0.75) | {"curve": points(*rewards)}
    ours["scores"]["training"] |= {"reward": 1.0, "judged": 0.5}
    fit = record("long", "fit", 0, 0.5) | {"curve": [*points(0.1, 0.2), *points(0.2, 0.3)[1:], *points(0, 0.3)[1:]]}
    rows = algorithms_tables.long_table([before, ours, fit], "one", ["ours", "absent", "fit"]).splitlines()[2:]
    # The alignment of a point is half its reward; that of 2,000 images is in the straight part, as its neighbours are.
    assert values(rows[0]) == [
        f"{50 * rewards[20]:.0f}",
        "45",
        "",
        "",
        "75.0",
        "0.900",
        "7.5",
        "3.00",
        "+1.00",
        "6,000",
    ]
    assert values(rows[1]) == ["", "", "", "", "50.0", "0.900", "5.0", "3.00", "+0.00", "100"]


def test_some_columns_of_the_overview() -> None:
    records = [record(task, PRETRAINED, 0, 0.4) for task in TASKS]
    records += [record(task, "ours", 0, aligned) for task, aligned in zip(TASKS, (0.5, 0.8), strict=True)]
    columns = ("gain, points", "gain, unseen prompts", "passes to train, thousands", "passes to draw")
    heading, _, row = algorithms_tables.overview(records, TASKS, ["ours"], columns).splitlines()
    assert heading == f"|  | {' | '.join(columns)} |"
    assert values(row) == ["+25.0", "", "2", "10"]
    for run in records:
        run["scores"]["held_out"] = {"aligned": 0.5 if run["label"] == "ours" else 0.3}
    (row,) = algorithms_tables.overview(records, TASKS, ["ours"], columns).splitlines()[2:]
    assert values(row) == ["+25.0", "+20.0", "2", "10"]


def test_a_dear_way_to_draw_and_a_training() -> None:
    """A training of 2,000 passes is paid by the 30 passes more that the best of 4 takes for each of 67 images."""
    ours = record("one", "DPOK", 0, 0.75) | {"also": {"calm": {}, "NaN": {}}}
    ours["scores"]["calm"] = {"aligned": 0.5, "quality": 0.75, "calls": 10, "reward_calls": 1}
    long = ours | {"task": "long", "label": "other"}  # which counts in a table of its own
    best = record("one", "best of 4", 0, 0.5, algorithm=UNTRAINED)
    best["scores"]["training"] |= {"calls": 40, "reward_calls": 4}
    records = [record("one", PRETRAINED, 0, 0.25), best, ours, long]
    rows = algorithms_tables.drawing_table(records, ["one"], [PRETRAINED, "best of 4"], "DPOK").splitlines()[2:]
    assert rows == [
        "| pre-trained | 25.0 | 0.900 | 10 | 1 |  |",
        "| best of 4 | 50.0 | 0.900 | 40 | 4 | 67 |",
        "| DPOK | 75.0 | 0.900 | 10 | 1 |  |",
        "| DPOK, calm | 50.0 | 0.750 | 10 | 1 |  |",
        "| DPOK, NaN |  |  |  |  |  |",
    ]
    heading, _, row = algorithms_tables.long_drawing_table(records, ["DPOK", "other"]).splitlines()
    assert heading == "|  | as trained | calm | NaN |"
    assert row == "| other | 75, 0.90 | 50, 0.75 |  |"


def test_components_are_compared_with_all_runs_of_dpok() -> None:
    """Three seeds against five on two tasks can tell one of eleven from noise; against three they could not."""
    rng, records = np.random.default_rng(0), []
    for task, seed in itertools.product(TASKS, range(5)):
        records.append(record(task, PRETRAINED, seed, 0.4 + seed / 100))
        records.append(record(task, "DPOK", seed, 0.9 + seed / 100 + rng.normal(0, 0.01)))  # the noise of the seed
        if seed < 3:
            records.append(record(task, "DPOK: bad", seed, 0.8 + seed / 100))
            records += [record(task, f"DPOK: {n}", seed, 0.9 + seed / 100 + rng.normal(0, 0.01)) for n in range(10)]
    rows = algorithms_tables.components_table(records, TASKS).splitlines()[2:]
    assert len(rows) == 12
    first, bad, _, *_ = rows
    assert values(first)[1:3] == ["", ""]
    assert values(first)[4] == "0.900"
    for each in values(first)[5:]:
        assert [float(gain) for gain in each.split()] == pytest.approx([50] * 5, abs=3)
    assert values(bad)[0] == "+40.0"
    assert float(values(bad)[1].partition(" ")[0]) == pytest.approx(-10, abs=1)
    assert values(bad)[4:] == ["0.900", "+40 +40 +40", "+40 +40 +40"]
    assert [row.count("**") for row in rows] == [0, 2] + 10 * [0]  # the p-value of one is bold
    assert algorithms_tables.components_table([], TASKS).count("\n") == 2


@pytest.mark.slow
def test_the_report(tmp_path: Any) -> None:
    tuned: Any = {(search, label): {} for search in ("diffusion", "flow") for label in SETTINGS["methods"]}
    rng, records = np.random.default_rng(0), []
    settings = SETTINGS | {"seeds": 2}
    for description in algorithms.descriptions(settings, tuned):
        start = 0.0 if description["label"] == PRETRAINED else 0.5
        run = record(description["task"], description["label"], description["seed"], start + rng.random() / 2)
        sets = [*description.get("splits", ["training", "held_out"])[1:], *description.get("also", {})]
        scores = dict.fromkeys(["training", *sets], run["scores"]["training"])
        records.append(run | description | {"scores": scores, "curve": points(*rng.random(8))})
    for run in records:
        if (run["label"], run["seed"]) == ("DDPO", 0):
            run |= {"diverged": "the image is not finite", "scores": {}, "curve": []}
    (tmp_path / "images").mkdir()
    for task in ("many", "count"):  # the rows of white images of two runs
        Image.new("RGB", (8 * 64, 64), "white").save(tmp_path / "images" / f"{task}-pre-trained.png")
    algorithms.report(records, settings, tmp_path, Tuning(settings, tmp_path / "tuning.jsonl"))
    names = ("gains", "frontier", "costs", "curves", "over_optimisation", "grid-many", "grid-long")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in names)
    text = (tmp_path / "tables.md").read_text()
    titles = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")]
    assert titles[:13] == [
        "How to read the tables",
        "In short",
        *(f"{what} over all tasks" for what in ("Gains", "Each two methods", "Equal costs")),
        *(f"{what} over the tasks with a gradient" for what in ("Gains", "Each two methods", "Equal costs")),
        "The paper's two claims",
        "Components of DPOK",
        "Other ways to draw",
        "Long runs",
        "Other ways to draw after the long runs",
    ]
    assert len(titles) == 13 + len(SETTINGS["tasks"]) + 2
    assert len(SETTINGS["shown"]["short"]) <= 8  # the README has them
    assert titles[-1] == "Settings that were chosen"
    assert "/shapes/weights/unet/diffusion_pytorch_model.safetensors" in (tmp_path / "SHA256SUMS").read_text()
    parts = dict(zip(titles, text.split("\n### ")[1:], strict=True))
    n_labels = len(SETTINGS["methods"]) + len(SETTINGS["untrained"])
    assert parts["Task “count”"].count("\n| ") == n_labels + 2
    assert parts["Task “flow”"].count("\n| ") == n_labels - 1  # three variants run on three tasks only
    # Nor has DRaFT runs where the reward has no gradient.
    assert parts["Task “pair”"].count("\n| ") == n_labels
    for what in ("Gains", "Each two methods", "Equal costs"):
        assert "| DRaFT |" not in parts[f"{what} over all tasks"]
        assert "| DRaFT |" in parts[f"{what} over the tasks with a gradient"]
    assert parts["In short"].count("\n| ") == len(SETTINGS["shown"]["short"]) + 2
    assert parts["Long runs"].count("\n| ") == len(SETTINGS["methods"]) - len(SETTINGS["long"]["without"]) + 2
    assert parts["Components of DPOK"].count("\n| ") == len(SETTINGS["components"]["changes"]) + 3  # and of DPOK
    assert parts["Kinds of prompts of “many”"].count("\n| ") == n_labels
    assert parts["Other ways to draw"].count("\n| DPOK") == 1 + len(SETTINGS["methods"]["DPOK"]["also"])
    assert parts["Other ways to draw"].count("\n| ") == 3 + len(SETTINGS["methods"]["DPOK"]["also"]) + len(
        SETTINGS["untrained"]
    )
    assert parts["The paper's two claims"].count("\n| ") == 2 + len(SETTINGS["claims"])


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 9, 40])
def test_the_report_of_a_few_runs(n: int, tmp_path: Any) -> None:
    """A sweep that is interrupted reports what there is."""
    tuned: Any = {(search, label): {} for search in ("diffusion", "flow") for label in SETTINGS["methods"]}
    records = []
    for description in itertools.islice(algorithms.descriptions(SETTINGS, tuned), n):
        run = record(description["task"], description["label"], description["seed"], 0.5)
        curve = [] if description["algorithm"] == UNTRAINED else points(0.1, 0.2, 0.3)
        records.append(run | description | {"curve": curve})
    algorithms.report(records, SETTINGS, tmp_path, Tuning(SETTINGS, tmp_path / "tuning.jsonl"))
    text = (tmp_path / "tables.md").read_text()
    of_count = text.partition("### Task “count”\n\n")[2].partition("\n\n")[0].splitlines()
    methods = {record["label"] for record in records if not record["label"].startswith("DPOK: ")}
    assert {row.split(" | ")[0].removeprefix("| ") for row in of_count[2:]} == methods
    assert all(" 50.0 " in row for row in of_count[2:])


def test_the_spread_of_seconds_is_that_of_runs_with_the_same_work() -> None:
    seconds = {("one", "ours"): (4.0, 5.0, 4.5), ("one", "theirs"): (10.0, 11.0), ("two", "ours"): (100.0, 150.0)}
    records = [record("one", PRETRAINED, 0, 0.5, seconds=0.0)]
    records += [record(*run, seed, 0.5, seconds=each) for run, of in seconds.items() for seed, each in enumerate(of)]
    assert algorithms_records.spread_of_seconds(records) == (pytest.approx(0.25), pytest.approx(0.5))
    assert algorithms_records.spread_of_seconds(records[:1]) == (0, 0)


PUBLISHED = HERE / "results" / "algorithms"
PAGE = (HERE.parent / "docs" / "reference" / "comparison.md").read_text(encoding="utf-8")


def test_the_numbers_in_the_sentences_of_the_page_are_in_the_tables() -> None:
    tables = (PUBLISHED / "tables.md").read_text(encoding="utf-8")
    numbers = re.findall(r"(?<![\d.])\d+\.\d+", re.sub("<!--.*?-->", "", PAGE))
    assert len(numbers) > 10
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", tables), number


def test_the_page_has_all_tables_and_figures() -> None:
    titles = re.findall("^### (.+)$", (PUBLISHED / "tables.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(titles) > 15
    for title in titles:
        assert f"<!-- generate: file benchmarks/results/algorithms/tables.md|{title} -->" in PAGE
    figures = [path.name for path in PUBLISHED.glob("*.png")]
    assert len(figures) >= 5
    for figure in figures:
        assert f"(../../benchmarks/results/algorithms/{figure})" in PAGE


@pytest.mark.slow
def test_the_published_tables_are_those_of_the_runs() -> None:
    records = algorithms.in_order(read_records(PUBLISHED / "runs.jsonl"), SETTINGS)
    text = algorithms.make_text(records, SETTINGS, Tuning(SETTINGS, PUBLISHED / "tuning.jsonl"))
    assert text == (PUBLISHED / "tables.md").read_text(encoding="utf-8")


def test_the_published_checksums_are_those_of_the_files() -> None:
    lines = [line.split("  ") for line in (PUBLISHED / "SHA256SUMS").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(algorithms.WEIGHTS) + 2
    for checksum, place in lines:
        assert hashlib.sha256((PUBLISHED / place).read_bytes()).hexdigest() == checksum, place
