"""The objective E[r] - beta KL that algorithms reach on DPOK-Mixture-v0, beside the best there is.

Both are computed on a grid (:mod:`dpok_gym.mixture.optimum`), so no drawn image adds noise to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from agents.algorithms.presets import PRESETS
from benchmarks.mixture_policies import GRID, half_reward, make_env, train
from dpok_gym.mixture.exact import GridPolicy, best_policy
from dpok_gym.mixture.optimum import policy_value
from dpok_gym.samplers import Transition
from dpok_gym.vector_env import DenoisingVectorEnv

T = 20
#: Images of each training.
IMAGES = PRESETS["exact-objective"].images

#: The case that can be solved in two ways.
HALF = {"mixture-linear": 0.5}


class Case(NamedTuple):
    """A task with a known optimum.

    Attributes:
        model: "mixture-1d" or "mixture".
        prompt: the only prompt.
        reward: weights by name.
        beta: reward per nat.
    """

    model: str
    prompt: str
    reward: dict[str, float]
    beta: float

    def __str__(self) -> str:
        ((name, weight),) = self.reward.items()
        return f"{self.prompt} ({self.model}), {weight} {name}, beta {self.beta}"


CASES = (
    Case("mixture-1d", "two modes", HALF, 1.0),
    Case("mixture-1d", "two modes", HALF, 0.25),
    Case("mixture", "two modes", HALF, 1.0),
    Case("mixture", "ring of six", HALF, 1.0),
    Case("mixture", "ring of six", {"mixture-quadratic": 0.3}, 1.0),
    Case("mixture", "ring of six", {"mixture-bump": 1.0}, 0.25),
)

#: A registered algorithm, and its arguments.
LEARNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPOK, its defaults": ("dpok", {}),
    "DPOK, its defaults, no critic": ("dpok", {"use_critic": False}),
    "DPOK, KL in the loss": ("dpok", PRESETS["exact-objective"].algorithm_kwargs("dpok") | {"kl_placement": "loss"}),
    "DPOK, KL in the reward": ("dpok", PRESETS["exact-objective"].algorithm_kwargs("dpok")),
    "GRPO": ("grpo", PRESETS["exact-objective"].algorithm_kwargs("grpo") | {"batch_size": 256, "group_size": 256}),
}


def score(env: DenoisingVectorEnv, case: Case, transition: Transition | None = None) -> dict[str, float]:
    """Returns E[r], the KL and the objective of a transition; of the pre-trained model if it is None."""
    expected = policy_value(env.process, case.prompt, env.rewards_of, 0.0, transition)
    objective = policy_value(env.process, case.prompt, env.rewards_of, case.beta, transition)
    return {"E[r]": expected, "KL": (expected - objective) / case.beta, "objective": objective}


def objectives(seeds: int, images: int = IMAGES) -> list[dict[str, Any]]:
    """Trains every learner on every case.

    Args:
        seeds: number of trainings of each.
        images: of each training.

    Returns:
        A row for each policy. "regret" is what is missing to the optimum, "share" the share of the possible gain over
        the pre-trained model.
    """
    rows: list[dict[str, Any]] = []
    for case in CASES:
        rows += rows_of(case, seeds, images)
    return rows


def rows_of(case: Case, seeds: int, images: int = IMAGES) -> Iterator[dict[str, Any]]:
    """Yields the rows of one case; arguments as for :func:`objectives`."""
    env = make_env(case.prompt, case.reward, T, case.model)
    optimum = env.optimal_value(case.beta)
    start = score(env, case)

    def row(policy: str, scores: dict[str, float], **more: Any) -> dict[str, Any]:
        regret = optimum - scores["objective"]
        share = 1 - regret / (optimum - start["objective"])
        return {"case": str(case), "policy": policy, **scores, "regret": regret, "share": share, **more}

    yield row("pre-trained", start)
    yield row("optimum", {"objective": optimum})
    if case.model == "mixture-1d":
        yield row("KL in the loss, exact", exact_loss(env, case))
    for name, (algorithm, kwargs) in LEARNERS.items():
        arguments = kwargs | {"kl_coef": kl_coef(env, case, algorithm)}
        for seed in range(seeds):
            policy, seconds = train(env, algorithm, arguments, seed, images)
            yield row(name, score(env, case, policy.transition), seed=seed, seconds=seconds)


def exact_loss(env: DenoisingVectorEnv, case: Case) -> dict[str, float]:
    """Scores the policy that learning with the KL in the loss comes to rest at; for the reward 0.5 x in 1-D."""
    assert case.reward == HALF
    conditioning = env.process.encode([case.prompt] * len(GRID))

    def mean(step: int, latents: Tensor) -> Tensor:
        return env.process.transition(env.process.state(latents, step, conditioning))[0]

    reference = GridPolicy.of(mean, env.process.table.std, GRID)
    policy = best_policy(reference, half_reward, case.beta, charge_later_kl=False)
    expected, kl = policy.expectation(half_reward), float(policy.step_kl(reference).sum())
    return {"E[r]": expected, "KL": kl, "objective": expected - case.beta * kl}


def kl_coef(env: DenoisingVectorEnv, case: Case, algorithm: str) -> float:
    """Returns beta in the unit of the algorithm's advantages.

    GRPO divides them by the standard deviation of the rewards. Here that of the pre-trained model counts; GRPO's own
    changes with the policy, and with it what a nat costs.
    """
    if algorithm != "grpo":
        return case.beta

    def squared(latents: Tensor, prompt: str) -> NDArray[np.float64]:
        return env.rewards_of(latents, prompt) ** 2

    mean, square = (policy_value(env.process, case.prompt, each, 0.0) for each in (env.rewards_of, squared))
    return case.beta / float(np.sqrt(square - mean**2))
