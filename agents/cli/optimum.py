"""A run beside the best possible policy, in worlds where that one is known."""

from __future__ import annotations

from pathlib import Path

from agents.cli import plots
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.evaluation import Evaluation, sample_images
from dpok_gym.samplers import Transition
from dpok_gym.vector_env import DenoisingVectorEnv


def compare_with_optimum(
    agent: DenoisingAlgorithm,
    env: DenoisingVectorEnv,
    before: Evaluation,
    after: Evaluation,
    seed: int,
    path: Path,
    title: str,
    label: str,
) -> dict[str, float] | None:
    """Computes E[r] - beta KL of the models and of the best policy, and draws where the images of all three lie.

    Args:
        agent: its ``nat_price`` is beta.
        env: the environment of the evaluations.
        before: images of the pre-trained model.
        after: images of the fine-tuned model, of the same prompts and seeds.
        seed: of the first image.
        path: file of the figure; it is not written where the best policy is not known.
        title: above the figure.
        label: of the fine-tuned model.

    Returns:
        beta as ``nat_price``, the values ``before``, ``after`` and ``optimum``, and the ``regret``; None where the best
        policy is not known.
    """
    beta, optimum = agent.nat_price, env.world.optimum if env.world else None
    if beta is None or optimum is None:
        return None
    problem = (env.process, env.prompts, env.rewards_of, beta)
    best = optimum.transition(*problem)
    drawn = sample_images(env.process, env, before.prompts, seed, best)
    models: dict[str, tuple[str, Transition, Evaluation]] = {
        "before": ("pre-trained", agent.policy.reference_transition, before),
        "after": (label, agent.policy.transition, after),
        "optimum": ("best possible", best, drawn),
    }
    values, panels = {}, {}
    for name, (model, transition, evaluation) in models.items():
        values[name] = optimum.value_of(*problem, transition)
        panels[f"{model}\nE[r] - {beta:g} KL = {values[name]:.3f}"] = optimum.positions(evaluation.images)
    plots.scatter(panels, before.prompts, path, optimum.reach, title)
    return {"nat_price": beta} | values | {"regret": values["optimum"] - values["after"]}
