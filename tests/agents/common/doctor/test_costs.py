"""Memory and time of a check-up, and what they say of the whole training."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import RWR, DiffusionDPO
from agents.common.doctor import costs
from agents.common.doctor.costs import Meter, check_memory, check_throughput

CPU = torch.device("cpu")


def test_a_meter() -> None:
    with Meter(CPU) as meter:
        time.sleep(0.01)
    assert meter.seconds >= 0.01
    assert meter.peak > 2**25  # torch alone takes more


@pytest.mark.parametrize(("peak", "status"), [(10, "ok"), (95, "warning"), (0, "ok")])
def test_memory(peak: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak of 0 is an unknown one."""
    monkeypatch.setattr(costs, "_memory_of", lambda device: 100 * 2**30)
    finding = check_memory(CPU, peak * 2**30, 0)
    assert finding.status == status
    assert (f"{peak}.00 GiB" if peak else "an unknown amount") in finding.measured


def seconds(value: float) -> Meter:
    meter = Meter(CPU)
    meter.seconds = value
    return meter


def test_throughput(make_agent: Callable[..., Any]) -> None:
    """10 images take 5 and 15 seconds; an evaluation before draws once, one after twice."""
    found = check_throughput(make_agent(), 10, 3, seconds(5), seconds(15), 1000, 20)
    assert "draws 2 and learns from 0.667 images per second" in found.measured
    assert "about 33 minutes for 1,000 images, and about 30 seconds for the two evaluations" in found.measured
    hours = check_throughput(make_agent(), 10, 3, seconds(5), seconds(15), 20_000, 0).measured
    assert hours.endswith("about 11.1 hours for 20,000 images")


def test_throughput_of_an_algorithm_that_fits_images_drawn_before(make_agent: Callable[..., Any]) -> None:
    """Drawing takes 50 seconds, and each of 100 optimiser steps takes 2."""
    agent = make_agent(algorithm=RWR, n_gradient_steps=100)
    found = check_throughput(agent, 10, 5, seconds(5), seconds(10), 100, 0)
    assert "takes 0.5 optimiser steps per second: about 4 minutes for 100 images" in found.measured


def test_throughput_of_diffusion_dpo(make_agent: Callable[..., Any], tmp_path: Path) -> None:
    """However many images an iteration has, it takes 50 optimiser steps; with choices no image is drawn."""
    kwargs: dict[str, Any] = {"algorithm": DiffusionDPO, "steps_per_iteration": 50, "n_gradient_steps": 300}
    measured = 10, 50, seconds(5), seconds(100)
    online = make_agent(images_per_iteration=40, **kwargs)  # 5 iterations: 100 seconds to draw, 500 to learn
    found = check_throughput(online, *measured, 200, 0).measured
    assert "draws 2 images and takes 0.5 optimiser steps per second: about 10 minutes for 200 images" in found
    offline = make_agent(choices=tmp_path / "choices.jsonl", **kwargs)
    assert "about 10 minutes for 300 optimiser steps" in check_throughput(offline, *measured, 10_000, 0).measured
