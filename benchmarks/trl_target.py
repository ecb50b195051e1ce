"""DPOK here and DDPO in TRL, to the same target: ``python -m benchmarks.trl_target --trl TRL/bin/python``.

Both fine-tune the embedded diffusion model for "three green squares" with the judge's alignment as the reward, until
90 % of the latest 128 images are fully aligned. The table has the images and the seconds that each needs, on all cores.
Both draw 64 images an iteration in 10 steps, and take an optimiser step for each 64 transitions. ``dpok-gym`` has the
preset "laptop", TRL 0.19.1 its defaults; its guidance is 1.0001, as it fails at 1, and it trains without the
unconditional pass that it would make for that.

For each, four learning rates are tried with a seed of their own, and the fastest one runs with three other seeds. A run
ends at the target, or after the images that are given for each. A run of TRL also ends once it has taken four times as
long as the slowest run of ``dpok-gym`` at its fastest rate. Finished runs are kept in ``--out``. The environment for
TRL needs ``gymnasium`` and ``scipy`` beside the packages that :mod:`benchmarks.side_by_side` names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "dpok_gym" / "shapes" / "weights"
PROMPT, REWARD, N_STEPS, N_IMAGES = "three green squares", "shapes-alignment", 10, 64
TARGET, WINDOW = 0.9, 128
TUNING_SEED, SEEDS = 100, (0, 1, 2)
#: How many times as long as the slowest run of this library, at its fastest rate, a run of TRL may take.
PATIENCE = 4
OURS, TRL = "dpok-gym", "trl"


class Rate(NamedTuple):
    """A learning rate that is tried.

    Attributes:
        learning_rate: the rate.
        images: most images of a run. Here the learning rate falls until then; in TRL it is constant.
    """

    learning_rate: float
    images: int


RATES = {
    OURS: [Rate(rate, 2240) for rate in (1.5e-3, 3e-3, 6e-3, 1.2e-2)],
    TRL: [Rate(rate, 8960) for rate in (3e-4, 1e-3, 3e-3, 1e-2)],
}

#: A run: ``library``, ``learning_rate``, ``seed``, ``reached``, and in the end ``images``, ``seconds`` and ``aligned``.
Run = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Makes the runs that are missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="Python of an environment with TRL; without it, TRL is left out")
    parser.add_argument("--out", type=Path, default=Path("runs/trl_target.json"), help="JSON file of the runs")
    parser.add_argument("--worker", nargs=4, metavar=("LIBRARY", "RATE", "IMAGES", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        library, rate, images, seed = options.worker
        WORKERS[library](Rate(float(rate), int(images)), int(seed))
        return
    runs: list[Run] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else []
    pythons = {OURS: Path(sys.executable)} | ({TRL: options.trl} if options.trl else {})

    def make(library: str, rate: Rate, seed: int, limit: float) -> Run:
        key = {"library": library, "learning_rate": rate.learning_rate, "seed": seed}
        for run in runs:
            if key.items() <= run.items():
                return run
        runs.append(key | follow(pythons[library], library, rate, seed, limit))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
        return runs[-1]

    limit = float("inf")
    for library in pythons:  # ours first, which sets the limit
        tried = [(make(library, rate, TUNING_SEED, limit), rate) for rate in RATES[library]]
        fastest, rate = min(tried, key=lambda pair: _slowness(pair[0]))
        finals = [fastest, *(make(library, rate, seed, limit) for seed in SEEDS)]
        limit = PATIENCE * max(run["seconds"] for run in finals)
    show(runs)


def _slowness(run: Run) -> tuple[bool, float]:
    """The order of the runs: first those that reach the target, by their time, then the others, by what they reach."""
    return not run["reached"], run["seconds"] if run["reached"] else -run["aligned"]


def follow(python: Path, library: str, rate: Rate, seed: int, limit: float) -> Run:
    """Starts a worker and reads its iterations, until the target or the limit is reached.

    Args:
        python: its interpreter.
        library: which worker.
        rate: the learning rate and the most images.
        seed: of the run.
        limit: seconds of training.

    Returns:
        What there is to know of the run but its settings.

    Raises:
        RuntimeError: if the worker fails.
    """
    words = [str(python), "-m", "benchmarks.trl_target", "--worker", library, *map(str, rate), str(seed)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    latest: list[Run] = []
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            latest = [*latest, json.loads(line)][-WINDOW // N_IMAGES :]
            aligned = mean(iteration["aligned"] for iteration in latest)
            reached = len(latest) == WINDOW // N_IMAGES and aligned >= TARGET
            if reached or latest[-1]["seconds"] > limit:
                worker.kill()
                return latest[-1] | {"aligned": aligned, "reached": reached}
    if worker.returncode or not latest:
        raise RuntimeError(f"{' '.join(words)} failed with exit code {worker.returncode}; what it printed is above")
    return latest[-1] | {"aligned": aligned, "reached": False}


def show(runs: list[Run]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    headings = ("learning rate", "seed", "images", "seconds", "fully aligned", "reached")
    table = Table("", *headings, title=f"{TARGET:.0%} of the latest {WINDOW} images fully aligned")
    for run in sorted(runs, key=lambda run: (run["library"], run["seed"], run["learning_rate"])):
        cells = [f"{run['learning_rate']:g}", str(run["seed"]), str(run["images"]), f"{run['seconds']:.0f}"]
        table.add_row(run["library"], *cells, f"{run['aligned']:.1%}", "yes" if run["reached"] else "no")
    Console(width=120).print(table)


# ------------------------------------------------------------------------------------------------------------- workers


def _reporter() -> Callable[[int, float], None]:
    """Returns a function that prints an iteration: the images so far, and the share of its own that is aligned."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print, too
    started = time.perf_counter()

    def report(images: int, aligned: float) -> None:
        seconds = round(time.perf_counter() - started, 1)
        print(json.dumps({"images": images, "seconds": seconds, "aligned": aligned}), file=answers, flush=True)

    return report


def dpok_gym(rate: Rate, seed: int) -> None:
    """DPOK of this library, as ``dpok train`` runs it."""
    from stable_baselines3.common.callbacks import BaseCallback

    from agents import DPOK, PRESETS
    from dpok_gym.vector_env import DenoisingVectorEnv

    class Reporter(BaseCallback):
        model: DPOK

        def _on_training_start(self) -> None:
            self._report = _reporter()

        def _on_rollout_end(self) -> None:
            self._report(self.model.images_drawn + N_IMAGES, self.logger.name_to_value["rollout/aligned_share"])

        def _on_step(self) -> bool:
            return True

    env = DenoisingVectorEnv(
        N_IMAGES, prompts=PROMPT, reward=REWARD, num_inference_steps=N_STEPS, decode_batch_size=16, device="cpu"
    )
    settings = PRESETS["laptop"].algorithm_kwargs("dpok") | {"learning_rate": rate.learning_rate}
    agent = DPOK(env=env, seed=seed, device="cpu", **settings)
    agent.learn(rate.images * N_STEPS, Reporter())


def trl(rate: Rate, seed: int) -> None:
    """DDPOTrainer of TRL."""
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    from dpok_gym.rewards import make_reward

    judge, images = make_reward(REWARD), 0

    def score(drawn: Any, prompts: Any, _: Any) -> tuple[Any, dict[str, Any]]:
        nonlocal images
        rewards = judge(drawn.float().clamp(0, 1), list(prompts)).total
        images += len(rewards)
        report(images, (rewards == 1).double().mean().item())
        return rewards, {}

    config = DDPOConfig(
        seed=seed,
        mixed_precision="no",
        allow_tf32=False,
        sample_num_steps=N_STEPS,
        sample_guidance_scale=1.0001,
        sample_batch_size=N_IMAGES,
        sample_num_batches_per_epoch=1,
        train_batch_size=N_IMAGES,
        train_learning_rate=rate.learning_rate,
        train_cfg=False,
        save_freq=10**9,
        project_kwargs={"project_dir": tempfile.mkdtemp()},
    )
    pipeline = DefaultDDPOStableDiffusionPipeline(str(WEIGHTS), use_lora=True)
    trainer = DDPOTrainer(config, score, lambda: (PROMPT, {}), pipeline)
    report = _reporter()
    for epoch in range(rate.images // N_IMAGES):
        trainer.step(epoch, epoch)


WORKERS: dict[str, Callable[[Rate, int], None]] = {OURS: dpok_gym, TRL: trl}


if __name__ == "__main__":
    main()
