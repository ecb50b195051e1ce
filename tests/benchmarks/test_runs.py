"""Sweeps: they go on where they stopped."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import kl_analysis, runs
from tests.benchmarks.support import KL_SETTINGS, RESULTS, TINY


@pytest.mark.slow
def test_a_sweep_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    wanted = [TINY | {"algorithm": "untrained", "settings": {}, "seed": seed} for seed in range(2)]
    done = wanted[1] | {"scores": {"training": {"aligned": 0.5}}, "curve": [], "seconds": 1.0}
    done |= {"num_function_evaluations_to_draw": 1, "num_function_evaluations": 0}
    file.write_text(json.dumps(done) + "\n" + json.dumps(wanted[0])[:20])  # the last line was cut off
    assert runs.find_records(wanted, file) == [None, done]
    runs.sweep(wanted, file, processes=1)
    made, kept = runs.find_records(wanted, file)
    assert kept == done
    assert made is not None
    assert made["seed"] == 0
    assert np.isfinite(made["scores"]["training"]["aligned"])
    assert (tmp_path / "images" / "count-ours.png").is_file()
    assert runs.read_records(file) == [done, made]
    runs.sweep(wanted, file, processes=1)
    assert runs.find_records(wanted, file) == [made, done]


def test_a_line_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is no JSON"):
        runs.read_records(tmp_path / "runs.jsonl")
    assert runs.read_records(tmp_path / "none.jsonl") == []


@pytest.mark.slow
def test_a_sweep_survives_a_failing_run(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    sound = TINY | {"algorithm": "untrained", "settings": {}}
    wanted = [sound | {"draw": {"steering": "best-of", "n_particles": 0}}, sound]
    with pytest.raises(RuntimeError, match=r"count, ours, seed 0: n_particles must be an integer of at least 1"):
        runs.sweep(wanted, file, processes=1, images=False)
    failed, made = runs.find_records(wanted, file)
    assert failed is None
    assert made is not None
    assert not (tmp_path / "images").exists()


def test_the_file_of_a_row_has_a_name_that_every_system_allows() -> None:
    assert runs.row_file(Path("x"), "count", "DPOK: no KL") == Path("x/images/count-DPOK - no KL.png")


def test_every_published_run_is_found() -> None:
    """By its description in the settings: none would be made again."""
    file = RESULTS / "kl_analysis" / "runs.jsonl"
    found = [record for record in runs.find_records(kl_analysis.descriptions(KL_SETTINGS), file) if record]
    assert len(found) == len(runs.read_records(file)) > 0
