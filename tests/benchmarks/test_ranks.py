"""The computed time of an iteration on many GPUs."""

import json
from dataclasses import asdict

import pytest

from benchmarks.ranks import Cluster, inequality, project, size_of_model
from benchmarks.runs import HERE


def test_the_size_of_stable_diffusion() -> None:
    parameters, flops = size_of_model()
    # 16 attention blocks with two attentions each, whose q, k, v and out projections get 8 x (inputs + outputs).
    assert parameters == 1_594_368
    assert flops == pytest.approx(0.8e12, rel=0.02)  # 401 GMACs, as published


def test_one_gpu_exchanges_nothing() -> None:
    row = project(1, Cluster())
    assert (row["exchange"], row["efficiency"]) == (0, pytest.approx(1))
    assert row["seconds"] == pytest.approx(row["draw"] + row["update"])


def test_more_gpus_draw_more_images_and_wait_for_the_slowest() -> None:
    few, many = project(8, Cluster()), project(64, Cluster())
    assert many["draw"] == few["draw"]
    assert many["update"] > few["update"]  # there are more shares, of which one is the largest
    assert 1 > few["efficiency"] > many["efficiency"]
    assert many["images_per_second"] > 7 * few["images_per_second"]


def test_a_batch_of_everything_is_shared_equally() -> None:
    assert inequality(32, 4, Cluster(batches=1)) == 1
    assert 1 < inequality(32, 4, Cluster(batches=4)) < inequality(32, 4, Cluster(batches=40))


def test_the_computed_times_as_published() -> None:
    results = json.loads((HERE / "results" / "ranks.json").read_text())
    assert results["assumed"] == asdict(Cluster())
    page = (HERE / "README.md").read_text()
    for row in results["computed"]:
        assert project(row["gpus"], Cluster()) == pytest.approx(row)
        seconds = f"{row['draw']:.3g} + {row['update']:.3g} + {row['exchange']:.2g}"
        numbers = f"{row['gpus']} | {row['images']:,} | {seconds} | {row['images_per_second']:.3g}"
        assert f"| {numbers} | {100 * row['efficiency']:.0f} % |" in page
