"""Where the time of a rollout goes: ``python -m benchmarks.profile_rollout``.

Collects rollouts with the default number of environments and prints the share of the wall time spent in the networks
(denoiser with text encoder, decoder, critic) and in the reward, and what is left: environment, buffer, SB3.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.callbacks import CallbackList

from agents import DPOK


@contextmanager
def timed(owner: Any, method: str, into: dict[str, float], name: str) -> Iterator[None]:
    """Within the block, adds up the seconds spent in ``owner.method``."""
    original: Callable[..., Any] = getattr(owner, method)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            into[name] += time.perf_counter() - started

    setattr(owner, method, wrapper)
    try:
        yield
    finally:
        delattr(owner, method)


def main() -> None:
    """Profiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-envs", type=int, default=64)
    parser.add_argument("--rollouts", type=int, default=3)
    options = parser.parse_args()

    agent = DPOK("DenoisingPolicy", gymnasium.make_vec("DPOK-Shapes-v0", num_envs=options.n_envs), seed=0)
    assert agent.env is not None
    callback = CallbackList([])
    callback.init_callback(agent)
    agent._setup_learn(1)
    model, env = agent.policy.model, agent.env.unwrapped.venv  # type: ignore[attr-defined]

    def collect() -> None:
        assert agent.env is not None
        agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, agent.n_steps)

    collect()  # warms the caches
    seconds: dict[str, float] = defaultdict(float)
    with (
        timed(model, "predict", seconds, "denoiser"),
        timed(model, "_encode", seconds, "text encoder"),
        timed(model, "decode", seconds, "decoder"),
        timed(agent.policy.critic, "forward", seconds, "critic"),
        timed(env, "reward", seconds, "reward"),
    ):
        started = time.perf_counter()
        for _ in range(options.rollouts):
            collect()
        total = time.perf_counter() - started
    seconds["everything else"] = total - sum(seconds.values())
    table = Table("part", "share", title=f"rollout of {options.n_envs} pictures, {agent.n_steps} steps")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value / total:.1%}")
    pictures = options.rollouts * options.n_envs
    Console().print(table, f"{pictures / total:.1f} pictures per second")


if __name__ == "__main__":
    main()
