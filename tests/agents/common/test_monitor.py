"""Warnings while training: each fires on a made history of what it is about, and on no other."""

import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from agents import TrainingWarning
from agents.common import monitor
from agents.common.monitor import DETECTORS, FIRST_ROWS, LATEST_ROWS, WINDOW, Monitor
from tests.agents.algorithms.support import Brightness, listen
from tests.agents.common.support import snapshot
from tests.support import assert_same

#: The columns of a sound training in n iterations: its level, its change over all iterations, and its noise.
SOUND = {
    "rollout/total_reward": (0.5, 0.4, 0.05),
    "rollout/held_out_reward": (0.3, 0.3, 0.2),
    "held_out/alignment": (0.2, 0.2, 0.1),
    "held_out/quality": (0.1, 0.1, 0.1),
    "rollout/equal_share": (0.2, 0.3, 0.1),
    "images/brightness": (0.6, 0.05, 0.02),
    "images/saturation": (0.2, 0.05, 0.02),
    "images/diversity": (0.2, -0.05, 0.01),
    "train/clip_fraction": (0.1, 0.1, 0.05),
    "train/kl_to_reference": (1.0, 15.0, 0.5),
}
#: What is otherwise in a training that goes wrong.
BROKEN: dict[str, dict[str, tuple[float, float, float]]] = {
    "reward_hacking": {"rollout/held_out_reward": (0.3, -1.0, 0.2)},
    "diversity_collapse": {"images/diversity": (0.2, -0.17, 0.01)},
    "brightness_runaway": {"images/brightness": (0.5, 0.4, 0.02)},
    "saturation_runaway": {"images/saturation": (0.5, -0.4, 0.02)},
    "equal_rewards": {"rollout/equal_share": (0.97, 0.0, 0.02)},
    "clipped_ratios": {"train/clip_fraction": (0.7, 0.1, 0.05)},
    "large_kl": {"train/kl_to_reference": (1.0, 300.0, 5.0)},
    "no_change": {"train/kl_to_reference": (0.0, 0.0, 0.0)},
}


def history(n: int, seed: int = 0, **changes: tuple[float, float, float]) -> list[dict[str, float]]:
    rng, rows = np.random.default_rng(seed), []
    for number in range(n):
        row = {"rollout/images": 64.0 * (number + 1)}
        for name, (level, change, noise) in (SOUND | changes).items():
            row[name] = level + change * number / (n - 1) + noise * rng.standard_normal()
        rows.append(row)
    return rows


def watch(rows: list[dict[str, float]]) -> dict[str, str]:
    watching = Monitor()
    for number, row in enumerate(rows):
        watching.add(number + 1, row)
    return watching.warned


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n", [12, 35, 400])
def test_a_sound_training_raises_no_alarm(n: int, seed: int) -> None:
    assert watch(history(n, seed)) == {}


@pytest.mark.parametrize("seed", range(20))
def test_noise_raises_no_alarm(seed: int) -> None:
    """Nothing changes, as in the drawing of an algorithm that fits images of the pre-trained model."""
    still = {name: (level, 0.0, noise) for name, (level, _, noise) in SOUND.items()}
    assert watch(history(300, seed, **still)) == {}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("n", [35, 400])
def test_each_alarm(name: str, n: int) -> None:
    warned = watch(history(n, **BROKEN[name]))
    assert warned.keys() == {name}
    assert warned[name].startswith("iteration ")
    assert "nan" not in warned[name]


def test_every_detector_has_a_test() -> None:
    assert BROKEN.keys() == DETECTORS.keys()


def test_a_part_of_the_held_out_reward_that_falls() -> None:
    (warning,) = watch(history(35, **{"held_out/quality": (0.7, -0.5, 0.1)})).values()
    assert "while held_out/quality fell by" in warning


def test_a_part_that_is_meant_to_fall() -> None:
    watching = Monitor()
    for number, row in enumerate(history(35, **{"held_out/quality": (0.7, -0.5, 0.1)})):
        watching.add(number + 1, row, unwanted={"held_out/quality"})
    assert watching.warned == {}


def test_a_held_out_reward_that_rises_first_and_then_falls() -> None:
    rows = history(30, **{"rollout/held_out_reward": (0.3, 0.5, 0.2)})
    assert watch(rows) == {}
    later = history(30, seed=1, **{"rollout/held_out_reward": (0.8, -1.5, 0.2)})
    for row in later:
        row["rollout/total_reward"] += 0.4
        rows.append(row)
    assert watch(rows).keys() == {"reward_hacking"}


def test_rows_without_a_column_and_values_that_are_not_finite() -> None:
    assert watch([{}] * 30) == {}
    assert watch([{"images/diversity": float("nan"), "train/kl_to_reference": float("inf")}] * 30) == {}


def test_the_state_is_bounded_and_json() -> None:
    watching = Monitor()
    for number, row in enumerate(history(300, **BROKEN["equal_rewards"])):
        watching.add(number + 1, row | {"time/fps": 1, "train/loss": np.float32(1)})
    assert len(watching.rows) == FIRST_ROWS + LATEST_ROWS
    assert watching.rows[0]["rollout/images"] == 64
    assert watching.rows[-1]["rollout/images"] == 64 * 300
    assert "train/loss" not in watching.rows[0]
    resumed = Monitor()
    resumed.load_state_dict(json.loads(json.dumps(watching.state_dict())))
    assert resumed.state_dict() == watching.state_dict()
    assert resumed.add(301, history(2)[0]) == watching.add(301, history(2)[0]) == []  # it was said already


def test_an_agent_warns_once_and_learns_the_same(make_agent: Callable[..., Any], make_env: Callable[..., Any]) -> None:
    """With a learning rate of 0, the KL stays 0."""
    agents = [make_agent(learning_rate=0.0, use_critic=False) for _ in range(2)]
    with pytest.warns(TrainingWarning, match=f"iteration {WINDOW}: after {WINDOW} iterations the KL") as caught:
        agents[0].learn((WINDOW + 2) * 12)
    assert len([each for each in caught if each.category is TrainingWarning]) == 1
    assert agents[0].monitor.warned.keys() == {"no_change"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        agents[1].learn((WINDOW + 2) * 12)
    assert_same(snapshot(agents[0]), snapshot(agents[1]))


def test_a_resumed_agent_does_not_warn_again(make_agent: Callable[..., Any]) -> None:
    agent, resumed = (make_agent(learning_rate=0.0, use_critic=False) for _ in range(2))
    with pytest.warns(TrainingWarning):
        agent.learn(WINDOW * 12)
    resumed.load_state_dict(agent.state_dict())
    assert resumed.monitor.state_dict() == agent.monitor.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        resumed.learn(12, reset_num_timesteps=False)


def test_the_log_has_what_the_detectors_read(make_agent: Callable[..., Any], make_env: Callable[..., Any]) -> None:
    agent = make_agent(make_env(prompts=["a rabbit"]), held_out_reward=Brightness())
    rows = listen(agent)
    agent.learn(12)
    assert set(monitor.COLUMNS) <= rows[0].keys()
    assert rows[0].keys() >= {"images/contrast", "rollout/reward_std"}
