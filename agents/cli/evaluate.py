"""``dpok evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from agents.cli.arguments import default_hint, given, parse_options
from agents.cli.steering import SteeringOptions, describe_steering, make_steering

if TYPE_CHECKING:
    from agents.cli.config import Config
    from dpok_gym.vector_env import DenoisingVectorEnv


@dataclass
class Evaluate:
    """Score a run on its training prompts and on prompts that it never saw, before and after training.

    Rewards that it was not trained on are scored too. Writes evaluation.json into the run folder.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Run folder of dpok train."""
    model: Annotated[Path | None, default_hint("FOLDER", "the run's")] = None
    """Folder of the run's model, if it has moved."""
    images: int = 256
    """Images for each set of prompts, before and after, 1 or more."""
    seed: Annotated[int | None, default_hint("INT", "the run's, which repeats its own evaluation")] = None
    """Seed of the images, 0 or more."""
    reward: Annotated[str | None, default_hint("NAME,...", "the world's; for other models the JPEG size")] = None
    """Further rewards to score with, which the run was not trained on."""
    trust: bool = False
    """Run the code that the run's config names: rewards, algorithms, models and environments of modules."""
    device: str = "auto"
    """Device of the networks: auto, cpu, cuda, cuda:1, ..."""
    steer: Annotated[SteeringOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=SteeringOptions)


def parse(argv: Sequence[str]) -> Evaluate:
    """Reads the options."""
    return parse_options(Evaluate, "dpok evaluate", argv)


def run(options: Evaluate) -> int:
    """Scores a run on training prompts and on held-out prompts; returns the exit code."""
    # These load torch; the help does not need it.
    from rich.console import Console

    from agents.cli.config import Config
    from agents.cli.environments import unseen_prompts
    from agents.cli.run_folder import load_agent
    from agents.cli.tables import say, scores_of, scores_table, write_json
    from agents.common.evaluation import cycle_prompts
    from agents.common.evaluation import evaluate as evaluate_policy
    from dpok_gym.utils.validation import MAX_SEED, check_integer

    config = Config.read(options.run, options.trust)
    check_integer("--images", options.images, maximum=10**6)
    if options.seed is not None:
        check_integer("--seed", options.seed, minimum=0, maximum=MAX_SEED)
    steering = make_steering(options.steer)
    config = replace(config, **given(options, "seed"))
    env = _make_env(options, config)
    agent = load_agent(options.run, config, env, options.device)
    console, results = Console(), {}
    for name, texts in {"training": env.prompts.train, "held-out": unseen_prompts(env)}.items():
        if not texts:  # a text or a file of prompts holds none out
            console.print(f"there are no {name} prompts")
            continue
        prompts = cycle_prompts(texts, options.images)
        # Both models draw from the same noise, so that the images differ by the training alone.
        draw = partial(evaluate_policy, agent.policy, env, prompts, config.evaluation_seed, steering=steering)
        before, after = draw(reference=True), draw()
        results[name] = {"n_prompts": len(set(texts))} | scores_of(before, after)
        title = f"{name} prompts (means of {options.images} images)"
        console.print(scores_table(title, results[name], from_choices=not agent.draws_images))
    cost = describe_steering(steering, env.process.num_inference_steps)
    calls, rewards = cost["denoiser_calls"], cost["reward_calls"]
    say(console, f"each image took {calls} calls of the denoiser, and the reward of {rewards} images")
    content = {
        "seed": config.seed,
        "images": options.images,
        "trained_on": list(config.env_kwargs["reward"]),
        "steering": cost,
        "prompts": results,
    }
    write_json(options.run / "evaluation.json", content)
    return 0


def _make_env(options: Evaluate, config: Config) -> DenoisingVectorEnv:
    """Makes the run's environment, with further rewards of weight 0."""
    from agents.cli.environments import EVALUATION_BATCH_SIZE, evaluation_rewards, parse_reward

    n_envs = min(options.images, EVALUATION_BATCH_SIZE)
    changes: dict[str, Any] = {"device": options.device}
    if options.model is not None:
        if not options.model.exists():
            raise FileNotFoundError(f"there is no folder {options.model}; --model is the folder of the run's model")
        changes["model"] = str(options.model)
    reward = config.env_kwargs["reward"]
    # The world is known only from an environment. A second one costs little, as the two share their networks.
    world = config.make_env(n_envs, **changes).world
    also: Sequence[str]
    if options.reward is not None:
        also = tuple(parse_reward(options.reward))
        if "=" in options.reward and any(weight != 1 for weight in parse_reward(options.reward).values()):
            raise ValueError(f"--reward takes names without weights here, since nothing is summed: {', '.join(also)}")
    elif world is not None:
        also = world.held_out_rewards
    elif any(name.startswith("jpeg-") for name in reward):  # one would only be minus the other
        also = ()
    else:
        also = ("jpeg-compressibility",)
    return config.make_env(n_envs, **(changes | {"reward": evaluation_rewards(world, reward, also)}))
