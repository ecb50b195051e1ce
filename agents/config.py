"""What a run is made of: the options of ``dpok train``, resolved, as ``config.yaml`` keeps them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import yaml

import dpok_gym  # noqa: F401  (registers the environments)
from agents.best_of_n import BestOfN
from agents.ddpo import DDPO
from agents.dpok import DPOK, PRESETS
from agents.draft import DRaFT
from agents.grpo import GRPO
from agents.on_policy import DenoisingAlgorithm
from agents.options import CLASSROOM, LAPTOP, LAPTOP_ALGORITHMS, MIXTURE, PICTURES, SHAPES, Train
from agents.policy import DenoisingPolicy
from agents.reinforce import REINFORCE
from agents.rwr import RWR
from agents.settings import defaults_of, hints_of, read_settings
from agents.sft import RewardWeightedSFT
from dpok_gym.checks import integer
from dpok_gym.files import replacing
from dpok_gym.models import MODELS
from dpok_gym.prompts import list_prompt_sets, load_prompts
from dpok_gym.rewards import list_rewards
from dpok_gym.rewards.remote import is_address
from dpok_gym.shapes.captions import parse_prompt
from dpok_gym.vector_env import DenoisingVectorEnv

ALGORITHMS: dict[str, type[DenoisingAlgorithm]] = {
    "dpok": DPOK,
    "ddpo": DDPO,
    "grpo": GRPO,
    "reinforce": REINFORCE,
    "sft": RewardWeightedSFT,
    "rwr": RWR,
    "best-of-n": BestOfN,
    "draft": DRaFT,
}

#: Rewards that evaluations in the embedded world always have.
SHAPES_REWARDS = ("shapes-alignment", "shapes-quality")

CONFIG = "config.yaml"

#: Pictures of an evaluation that are drawn side by side.
AT_A_TIME = 64

#: Options of ``dpok train``, or names for its ``--set``, that are arguments of environment, algorithm and policy.
ENV_OPTIONS = (
    "model",
    "num_inference_steps",
    "guidance_scale",
    "negative_prompt",
    "image_size",
    "dtype",
    "decode_batch_size",
    "reward_workers",
    "eta",
    "model_kwargs",
    "non_finite",
)
ALGORITHM_OPTIONS = (
    "kl_coef",
    "learning_rate",
    "batch_size",
    "micro_batch_size",
    "n_epochs",
    "timestep_fraction",
    "clip_range",
)
POLICY_OPTIONS = (
    "lora_rank",
    "target_modules",
    "autocast",
    "gradient_checkpointing",
    "guidance_gradient",
    "max_batch_size",
    "critic_hidden",
)
#: Arguments of an algorithm that are no settings of its learning, or are in the config under their own name.
_OTHER = {
    "policy",
    "env",
    "n_envs",
    "policy_kwargs",
    "stats_window_size",
    "tensorboard_log",
    "verbose",
    "seed",
    "device",
}


@dataclass
class Config:
    """Everything that a run depends on, resolved; ``config.yaml`` in its folder.

    Attributes:
        env: environment id.
        algo: a key of :data:`ALGORITHMS`.
        preset: that the settings come from.
        seed: of everything random.
        pictures: budget of the training.
        n_envs: pictures in each iteration.
        eval_pictures: pictures drawn before and after.
        device: of the networks.
        env_kwargs: of the environment; ``reward`` is always a dict, of weights or of settings with a weight.
        algo_kwargs: of the algorithm.
    """

    env: str
    algo: str
    preset: str
    seed: int
    pictures: int
    n_envs: int
    eval_pictures: int
    device: str
    env_kwargs: dict[str, Any]
    algo_kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("pictures", "n_envs", "eval_pictures"):
            integer(name, getattr(self, name))
        integer("the seed", self.seed, least=0)

    @classmethod
    def of(cls, options: Train) -> Config:
        """The options, and defaults where they say nothing."""
        of_env = {SHAPES: LAPTOP | LAPTOP_ALGORITHMS[options.algo], MIXTURE: CLASSROOM}
        defaults: dict[str, Any] = of_env.get(options.env, {"pictures": PICTURES})
        if options.preset != "default":
            if options.algo != "dpok":
                raise ValueError(f"the preset {options.preset!r} is one of dpok; leave it out for {options.algo}")
            kept = {name: value for name, value in defaults.items() if name in ("prompts", "pictures")}
            defaults = kept | PRESETS[options.preset]
        algorithm = defaults_of(ALGORITHMS[options.algo])
        hints = hints_of(DenoisingVectorEnv) | hints_of(DenoisingPolicy) | hints_of(ALGORITHMS[options.algo])
        chosen = given(options, *ALGORITHM_OPTIONS) | read_settings(options.set, hints)
        known = {*(algorithm.keys() - _OTHER), *POLICY_OPTIONS, *ENV_OPTIONS}
        if unknown := sorted(chosen.keys() - known):
            raise ValueError(f"{options.algo} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        if chosen.get("score_function"):  # which takes the whole rollout at once
            defaults = defaults | {"batch_size": None}
        chosen |= given(options, "prompts", "pictures", "n_envs")
        settings = {"prompts": None} | algorithm | defaults | chosen
        policy = {name: value for name, value in defaults_of(DenoisingPolicy).items() if name in POLICY_OPTIONS}
        policy |= (settings["policy_kwargs"] or {}) | {"autocast": options.autocast} | given(options, "lora_rank")
        policy["gradient_checkpointing"] |= options.gradient_checkpointing
        if options.lora_layers:
            policy["target_modules"] = options.lora_layers
        policy |= {name: value for name, value in chosen.items() if name in POLICY_OPTIONS}
        env_kwargs = default_env_kwargs(options.env) | {k: v for k, v in defaults.items() if k in ENV_OPTIONS}
        env_kwargs |= given(options, *ENV_OPTIONS) | {"device": options.device}
        env_kwargs |= {name: value for name, value in chosen.items() if name in ENV_OPTIONS}
        if settings["prompts"] is not None:
            env_kwargs["prompts"] = settings["prompts"]
        reward = defaults.get("reward", env_kwargs["reward"]) if options.reward is None else options.reward
        weights = {_absolute(name, list_rewards()): weight for name, weight in parse_reward(reward).items()}
        if options.normalize_rewards:
            weights = {name: {"weight": weight, "normalize": "running"} for name, weight in weights.items()}
        env_kwargs["reward"] = weights
        # A run may be read again from another folder.
        if os.path.isfile(str(env_kwargs["prompts"])):  # a folder of that name does not make a prompt a path
            env_kwargs["prompts"] = _absolute(env_kwargs["prompts"], list_prompt_sets())
        env_kwargs["model"] = _absolute(env_kwargs["model"], MODELS)
        return cls(
            env=options.env,
            algo=options.algo,
            preset=options.preset,
            seed=options.seed,
            pictures=settings["pictures"],
            n_envs=settings["n_envs"],
            eval_pictures=options.eval_pictures,
            device=options.device,
            env_kwargs=env_kwargs,
            algo_kwargs={name: settings[name] for name in algorithm if name not in _OTHER} | {"policy_kwargs": policy},
        )

    @classmethod
    def read(cls, folder: Path) -> Config:
        """Reads the config of a run."""
        path = folder / CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no run folder: it has no {CONFIG}, as dpok train writes it")
        try:
            return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except (TypeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is damaged, or of another version: {error}") from error

    def write(self, folder: Path) -> None:
        """Writes it."""
        with replacing(folder / CONFIG) as file:
            file.write_text(yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @property
    def is_shapes(self) -> bool:
        """Whether the judge of the embedded world can be asked."""
        return is_shapes(self.env, self.env_kwargs)

    @property
    def evaluation_seed(self) -> int:
        """Seed of the first evaluation picture, far from those that the training environments are seeded with."""
        return 1_000_000 * (self.seed + 1)

    def make_env(self, num_envs: int, also: Collection[str] = (), **changes: Any) -> DenoisingVectorEnv:
        """Makes the environment.

        Args:
            num_envs: pictures side by side.
            also: rewards to score with that do not count in the sum.
            **changes: to the environment's arguments.
        """
        reward = dict.fromkeys(also, 0.0) | self.env_kwargs["reward"]
        return make_env(self.env, num_envs, **(self.env_kwargs | {"reward": reward} | changes))

    def make_evaluation_env(self, n_pictures: int, also: Collection[str] = (), **changes: Any) -> DenoisingVectorEnv:
        """The environment to evaluate in."""
        also = (*(SHAPES_REWARDS if self.is_shapes else ()), *also)
        return self.make_env(min(n_pictures, AT_A_TIME), also, **changes)


def is_shapes(env_id: str, env_kwargs: Mapping[str, Any]) -> bool:
    """Whether pictures and prompts are such as the judge of the embedded world knows."""
    size = env_kwargs["image_size"]
    if env_id != SHAPES or env_kwargs["model"] != "shapes" or not (size is None or np.all(np.equal(size, 64))):
        return False
    try:
        for prompt in load_prompts(env_kwargs["prompts"]).train:
            parse_prompt(prompt)
    except ValueError:
        return False
    return True


def parse_reward(spec: Any) -> dict[str, Any]:
    """``name=weight,name=weight`` (a weight may be left out, for 1) as a dict; a dict is returned as it is.

    A name may be an address, or several with spaces between them: ``http://a:8000 http://b:8000=0.5``. One with a query
    needs its weight, as that follows the last "=", and one with a comma cannot be written so.
    """
    if not isinstance(spec, str):
        return dict(spec)
    weights: dict[str, Any] = {}
    for entry in spec.split(","):
        split = entry.rpartition if is_address(entry) and "=" in entry else entry.partition
        name, equals, weight = (part.strip() for part in split("="))
        if not name or name in weights:
            raise ValueError(f"a reward is written NAME or NAME=WEIGHT,NAME=WEIGHT with each name once, not {spec!r}")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            raise ValueError(f"the weight of the reward {name!r} must be a number, not {weight!r}") from None
    return weights


def make_env(env_id: str, num_envs: int, **kwargs: Any) -> DenoisingVectorEnv:
    """Makes the environment of an id; ``kwargs`` are changes to its arguments."""
    env = gymnasium.make_vec(env_id, num_envs=num_envs, vectorization_mode="vector_entry_point", **kwargs)
    assert isinstance(env, DenoisingVectorEnv)  # as default_env_kwargs saw to
    return env


def default_env_kwargs(env_id: str) -> dict[str, Any]:
    """The arguments that an id stands for, with the environment's own defaults."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:  # as in gymnasium.make("my_module:MyEnv-v0")
            importlib.import_module(module)
        spec = gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"there is no environment {env_id!r}: {error}") from error
    entry = spec.vector_entry_point
    creator = gymnasium.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
    if not (isinstance(creator, type) and issubclass(creator, DenoisingVectorEnv)):
        raise ValueError(f"{env_id} is no denoising environment such as {SHAPES}")
    own = {
        name: value
        for name, value in defaults_of(DenoisingVectorEnv).items()
        if name not in ("num_envs", "render_mode")
    }
    return own | spec.kwargs


def given(options: Any, *names: str) -> dict[str, Any]:
    """Those of the options that are not None."""
    return {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}


def _absolute(text: Any, names: Collection[str]) -> Any:
    """A path in full; names, which go before paths, and anything else as it is."""
    is_path = isinstance(text, str) and text not in names and os.path.exists(text)
    return os.path.abspath(text) if is_path else text
