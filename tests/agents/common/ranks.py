"""What each rank of the tests runs: short trainings, whose results rank 0 writes.

torchrun --nproc-per-node 2 -m tests.agents.common.ranks MODEL FOLDER NAME ...
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from agents.common import distributed
from agents.common.algorithm import DenoisingAlgorithm
from dpok_gym import DenoisingVectorEnv
from dpok_gym.models import clear_model_cache
from tests.agents.algorithms.support import ALGORITHMS, PROMPTS, Brightness, T, listen

N, ITERATIONS = 8, 3
#: What stands before a name and a colon, and what it changes.
CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    "sharded": {"shard": True, "micro_batch_size": 2},
    "sharded, one at a time": {"shard": True, "micro_batch_size": 2, "max_batch_size": 1},
    "sharded, whole": {"shard": True, "lora_rank": 0, "micro_batch_size": 2},
    "without a seed": {"seed": None},
}


class SomeFail(Brightness):
    """The brightness, which images of some brightness do not get: which ones fail depends on the image alone."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        rewards = self.score(images, prompts)
        return rewards.masked_fill((rewards * 1e4).long() % 4 == 0, torch.nan)


def make(
    name: str,
    model: str | Path,
    lora_rank: int = 2,
    shard: bool = False,
    max_batch_size: int | None = 64,
    **changes: Any,
) -> DenoisingAlgorithm:
    """Returns an agent on a fresh copy of the model."""
    clear_model_cache()
    env = DenoisingVectorEnv(
        2,
        model=str(model),
        prompts=PROMPTS,
        reward=SomeFail(),
        num_inference_steps=T,
        device="cpu",
        non_finite="mask",
        model_kwargs={"shard": shard},
    )
    cls, kwargs = ALGORITHMS[name]
    # A larger eps than the default: Adam divides by the gradient's own size, so at 1e-15 the sign of a gradient that is
    # 0 but for rounding would decide on a whole step.
    network = {"lora_rank": lora_rank, "critic_hidden": 16, "optimizer_kwargs": {"weight_decay": 0.0, "eps": 1e-4}}
    network["max_batch_size"] = max_batch_size
    settings: dict[str, Any] = {"learning_rate": 1e-3, "seed": 0, "device": "cpu", "images_per_iteration": N}
    settings |= {"anchor_coef": 0.1, "anchor_images": 5, "held_out_reward": Brightness()}
    settings |= {"max_kl": 1e6} if name == "DRaFT" else {"normalize_rewards": True}
    return cls(env=env, policy_kwargs=network, **settings | kwargs | changes)


def train(name: str, model: str | Path, **changes: Any) -> dict[str, Tensor]:
    """Trains, and returns all that the agent has learned, the images of its last iteration and what it logged."""
    agent = make(name, model, **changes)
    rows = listen(agent)
    agent.learn(ITERATIONS * N * T)
    results: dict[str, Tensor] = {}
    for group, tensors in agent.state_dict()["tensors"].items():
        results |= {f"{group}/{key}": values.clone() for key, values in tensors.items()}
    buffer = agent.rollout_buffer
    results["latents"] = buffer.gather(buffer.latents[:, -1]).clone()
    results["rewards"], results["valid"] = buffer.rewards.clone(), buffer.valid.clone()
    for key, value in rows[-1].items():
        if not key.startswith("time/") and not isinstance(value, str):
            results[f"log/{key}"] = torch.tensor(float(value))
    return results


def die(how: str, name: str, model: str) -> None:
    """Trains; in the second iteration, rank 1 raises an error or is killed."""
    agent = make(name, model, images_per_iteration=6)
    draw = agent.denoising_env.judge

    def judge(*args: Any) -> Any:
        if agent.iteration == 1 and distributed.index() == 1:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("the reward is broken")
        return draw(*args)

    agent.denoising_env.judge = judge  # type: ignore[assignment, method-assign]
    agent.learn(ITERATIONS * 6 * T)


def main(model: str, folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    distributed.start()
    for name in names:
        how, _, algorithm = name.rpartition(": ")
        if how in ("raise", "kill"):
            try:
                die(how, algorithm, model)
            except Exception as error:
                distributed.report(error)
                raise
        results = train(algorithm, model, **CHANGES[how])
        if distributed.is_main():
            save_file(results, Path(folder) / f"{name}.safetensors")
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
