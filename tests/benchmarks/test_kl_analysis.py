"""The analysis of the KL: its runs, and its tables."""

import json
from pathlib import Path

import pytest

from benchmarks import kl_analysis, runs
from benchmarks.kl_analysis import SHOWN
from tests.benchmarks.support import KL_SETTINGS, RESULTS, fake_records, mean_score, values


def test_descriptions() -> None:
    descriptions = kl_analysis.descriptions(KL_SETTINGS)
    assert len({json.dumps(description, sort_keys=True) for description in descriptions}) == len(descriptions)
    known = {each["family"] for each in descriptions}
    assert all(known >= set(figure["families"]) for figure in KL_SETTINGS["figures"].values())
    assert {(each["images"], each["eval_images"]) for each in descriptions} == {(960, 128)}


@pytest.mark.slow
def test_report(tmp_path: Path) -> None:
    records = fake_records(kl_analysis.descriptions(KL_SETTINGS | {"seeds": 2}))
    kl_analysis.report(records, KL_SETTINGS, tmp_path)
    text = (tmp_path / "table.md").read_text()
    (row,) = (line for line in text.split("\n") if line.startswith("| SFT, KL-O, 1 |"))
    of_label = [record for record in records if record["label"] == "SFT, KL-O, 1"]
    means = [f"{mean_score(of_label, score.prompts, score.name):{score.format}}" for score in SHOWN.values()]
    assert values(row) == ["2", *means]
    for one, other in KL_SETTINGS["claims"]:
        (row,) = (line for line in text.split("\n") if line.startswith(f"| {one} - {other} |"))
        ours = [record for record in records if record["label"] == one]
        theirs = [record for record in records if record["label"] == other]
        differences = []
        for prompts, name, format_spec in SHOWN.values():
            difference = mean_score(ours, prompts, name) - mean_score(theirs, prompts, name)
            differences.append(f"{difference:+{format_spec}}")
        assert values(row) == differences
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in KL_SETTINGS["figures"])


@pytest.mark.slow
def test_the_published_table_is_rebuilt() -> None:
    """From lines with old names; one family has an old word in its name."""
    file = RESULTS / "kl_analysis" / "runs.jsonl"
    records = [record for record in runs.find_records(kl_analysis.descriptions(KL_SETTINGS), file) if record]
    families = kl_analysis.collect(records)
    differences = kl_analysis.make_differences(families, KL_SETTINGS["claims"])
    text = kl_analysis.make_text(kl_analysis.make_rows(families), differences)
    published = (RESULTS / "kl_analysis" / "table.md").read_text(encoding="utf-8")
    assert text == published.replace("pictures", "images")
