"""The resolved settings of a run, as ``config.yaml`` keeps them."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from agents.algorithms.presets import PRESETS, default_preset
from agents.algorithms.registry import ALGORITHMS, load_algorithm
from agents.cli.environments import environment_class, environment_kwargs, make_env, parse_reward, registered_kwargs
from agents.common.algorithm import DEFAULT_N_ENVS, DenoisingAlgorithm
from agents.common.arguments import Argument, describe_arguments
from agents.common.policy import DenoisingPolicy
from dpok_gym.models.registry import find_source, is_factory, list_models
from dpok_gym.prompts import list_prompt_sets
from dpok_gym.registration import ENVIRONMENTS, TASKS
from dpok_gym.rewards.registry import is_place, list_rewards
from dpok_gym.utils.files import replacing
from dpok_gym.utils.reading import read_yaml
from dpok_gym.utils.validation import (
    MAX_COUNT,
    MAX_SEED,
    check_integer,
    check_mapping,
    check_names,
    check_path,
    check_positive,
    suggest,
)
from dpok_gym.vector_env import MAX_ENVS, DenoisingVectorEnv

FILE_NAME = "config.yaml"

#: Arguments of an algorithm that are fields of the config themselves, or that the command sets.
_NOT_SETTINGS = (
    "policy",
    "env",
    "n_envs",
    "policy_kwargs",
    "stats_window_size",
    "tensorboard_log",
    "verbose",
    "seed",
    "device",
)
#: Arguments of a policy that the algorithm sets, or that a text cannot express.
_NOT_POLICY_SETTINGS = ("use_sde", "use_critic", "critic_kind", "keep_old", "micro_batch_size", "optimizer_class")


#: An evaluation holds all of its images in memory.
_MAXIMA = {
    "images": MAX_COUNT,
    "n_envs": MAX_ENVS,
    "eval_images": 10**6,
    "checkpointing_steps": MAX_COUNT,
    "checkpoints_total_limit": MAX_COUNT,
}


#: What the options of a run are if neither the preset nor the command line says more.
_RUN_OPTIONS: dict[str, Any] = {
    "n_envs": DEFAULT_N_ENVS,
    "eval_images": 256,
    "checkpointing_steps": 10,
    "checkpointing_minutes": None,
    "checkpoints_total_limit": 2,
}


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on.

    Attributes:
        env: environment id.
        algo: name of the algorithm, or ``"module:Class"``.
        preset: name of the preset that the settings come from.
        seed: seed of everything random, at least 0.
        images: images to draw in training, at least 1.
        n_envs: images drawn side by side in training.
        eval_images: images drawn before and after training.
        device: device of the networks.
        checkpointing_steps: iterations between two checkpoints.
        checkpointing_minutes: minutes after which one is due in any case; None for no limit.
        checkpoints_total_limit: number of checkpoints that are kept.
        env_kwargs: arguments of the environment; ``reward`` is always a dict.
        algo_kwargs: arguments of the algorithm.
        policy_kwargs: arguments of its policy.

    Raises:
        ValueError: if a number is out of range, or an argument is unknown.
    """

    env: str
    algo: str
    preset: str
    seed: int
    images: int
    n_envs: int
    eval_images: int
    device: str
    checkpointing_steps: int
    checkpointing_minutes: float | None
    checkpoints_total_limit: int
    env_kwargs: dict[str, Any]
    algo_kwargs: dict[str, Any]
    policy_kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        for name, maximum in _MAXIMA.items():
            check_integer(name, getattr(self, name), maximum=maximum)
        if self.checkpointing_minutes is not None:
            check_positive("checkpointing_minutes (or None)", self.checkpointing_minutes)
        check_integer("the seed", self.seed, minimum=0, maximum=MAX_SEED)
        for name in ("env", "algo", "preset", "device"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a text, got {getattr(self, name)!r}")
        for name in ("env_kwargs", "algo_kwargs", "policy_kwargs"):
            check_mapping(name, getattr(self, name))
        if "reward" in self.env_kwargs:
            check_mapping("the reward", self.env_kwargs["reward"])
        if self.env_kwargs.get("model_kwargs") is not None:
            check_mapping("model_kwargs", self.env_kwargs["model_kwargs"])

    @classmethod
    def read(cls, folder: Path, trust: bool = False) -> Config:
        """Reads the config of a run. Nothing that it names is imported without ``trust``.

        Args:
            folder: the run folder.
            trust: whether modules that the config names may be imported, which runs their code. Their names are printed
                to standard error.

        Raises:
            FileNotFoundError: if the folder has none.
            ValueError: if the file is damaged, a key is unknown or missing, a value is out of range, or the file names
                code and is not trusted.
        """
        path = config_file(folder)
        try:
            values = read_yaml(path)
        except ValueError as error:
            raise ValueError(f"the config of the run is damaged: {error}; fix it, or train anew") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} is damaged: it is no mapping of keys to values; fix it, or train anew")
        known = [field.name for field in fields(cls)]
        # All keys must be there: a default that changes in a later version must not change an old run.
        check_names(f"key of {path}", values, known)
        for name in known:
            if name not in values:
                raise ValueError(f"{path} lacks the key {name!r}; add it, or train anew with this version")
        try:
            config = cls(**values)
            code = config.code()
            if code and not trust:
                raise ValueError(
                    f"it names code that would run: {', '.join(code)}; if you trust who wrote it, add --trust (in "
                    "Python, trust=True)"
                )
            if code:
                print(f"trusting {path}, which runs {', '.join(code)}", file=sys.stderr)
            config.check_keys()  # the file may have been edited by hand, or be of another version
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        return config

    def code(self) -> list[str]:
        """Returns what in the config makes Python run other code than this package; see :func:`named_code`."""
        kwargs = self.env_kwargs
        rewards = [*kwargs.get("reward", {}), *reward_names(self.algo_kwargs.get("held_out_reward"))]
        return named_code(self.env, self.algo, kwargs.get("model"), rewards, kwargs.get("model_kwargs"))

    def check_keys(self) -> None:
        """Checks that environment, algorithm and policy have exactly these arguments.

        Raises:
            ValueError: if one is unknown, or missing.
        """
        algorithm = load_algorithm(self.algo)
        # The device is a field of the config itself.
        _check_settings(self.env, self.env_kwargs, environment_kwargs(self.env).keys() - {"device"})
        _check_settings(self.algo, self.algo_kwargs, settings_of(algorithm))
        _check_settings("the policy", self.policy_kwargs, settings_of(DenoisingPolicy))

    def write(self, folder: Path) -> None:
        """Writes the config into a run folder."""
        with replacing(folder / FILE_NAME) as file:
            file.write_text(yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @property
    def algorithm_name(self) -> str:
        """The algorithm in figures: that of ``my_module:Mine`` is MINE."""
        return self.algo.rpartition(":")[2].upper()

    @property
    def heading(self) -> str:
        """The first line of the run's figures."""
        return f"{self.algorithm_name} on {self.env}, seed {self.seed}"

    @property
    def evaluation_seed(self) -> int:
        """Seed of the first evaluation image, far from the images of training."""
        return 1_000_000 * (self.seed + 1)

    def make_env(self, num_envs: int, **changes: Any) -> DenoisingVectorEnv:
        """Makes the environment.

        Args:
            num_envs: images side by side.
            **changes: changes to the environment's arguments.
        """
        return make_env(self.env, num_envs, **(self.env_kwargs | {"device": self.device} | changes))

    def make_agent(self, env: DenoisingVectorEnv | None, device: str | None = None) -> DenoisingAlgorithm:
        """Makes the agent, untrained.

        Args:
            env: the environment to learn in; None for an agent without networks, whose arguments are checked.
            device: device of the policy; None for the config's.
        """
        algorithm: Callable[..., DenoisingAlgorithm] = load_algorithm(self.algo)
        # None would mean "as many as there are environments". But dpok evaluate makes the agent in an environment that
        # may draw fewer images side by side than the one for training.
        per_iteration = self.algo_kwargs["images_per_iteration"]
        per_iteration = self.n_envs if per_iteration is None else per_iteration
        settings = self.algo_kwargs | {"images_per_iteration": per_iteration, "policy_kwargs": self.policy_kwargs}
        settings["_init_setup_model"] = env is not None
        return algorithm("DenoisingPolicy", env, seed=self.seed, device=device or self.device, **settings)


def named_code(env: str, algo: str, model: Any, rewards: Collection[str], model_kwargs: Any) -> list[str]:
    """Returns which of some settings make Python run other code than this package: modules to import, and pickles."""
    named = []
    if ":" in env:
        named.append(f"the environment {env!r}")
    if algo not in ALGORITHMS and ":" in algo:
        named.append(f"the algorithm {algo!r}")
    if isinstance(model, str) and model not in list_models() and is_factory(model):
        named.append(f"the model {model!r}")
    named += [f"the reward {name!r}" for name in rewards if is_place(name)]
    if (model_kwargs or {}).get("allow_pickle"):
        named.append("the model's allow_pickle")
    return named


def _check_settings(owner: str, settings: Mapping[str, Any], known: Collection[str]) -> None:
    check_names(f"argument of {owner}", settings, known)
    missing = [name for name in known if name not in settings]
    if missing:
        raise ValueError(f"the argument {missing[0]!r} of {owner} is missing; add it, or train anew with this version")


def default_config(env_id: str, algo: str, preset_name: str | None = None) -> Config:
    """Resolves the settings that a run has if the command line says nothing more.

    Each of these changes the ones before it: the defaults of the classes, the arguments that the environment id stands
    for, the preset.

    Args:
        env_id: environment id.
        algo: name of the algorithm, or ``"module:Class"``.
        preset_name: name of a preset; None for the one that suits the environment.

    Raises:
        ValueError: if one of them is unknown.
    """
    algorithm = load_algorithm(algo)
    env_class = environment_class(env_id)
    preset_name = default_preset(env_id) if preset_name is None else preset_name
    if preset_name not in PRESETS:
        raise ValueError(f"unknown preset {preset_name!r}; {suggest(preset_name, PRESETS)}")
    preset = PRESETS[preset_name]
    # Users may add presets to the dict, so the settings of a preset are checked like those of a command line.
    chosen = dict(preset.algorithm_kwargs(algo))
    run_options = {**_RUN_OPTIONS, **preset.run}
    check_names(f"option of a run in the preset {preset_name!r}", run_options, _RUN_OPTIONS)
    policy_kwargs = settings_of(DenoisingPolicy) | chosen.pop("policy_kwargs", {})
    own = settings_of(algorithm)
    check_names(f"argument of {algo} in the preset {preset_name!r}", chosen, own)
    check_names(f"argument of {env_class.__name__} in the preset", preset.env_kwargs, environment_kwargs(env_id))
    env_kwargs = environment_kwargs(env_id)
    name = env_id.rpartition(":")[2]
    if name not in TASKS:  # a task's settings are fixed
        # What users register an id of their own with, they mean.
        own_kwargs = {} if name in ENVIRONMENTS else registered_kwargs(env_id)
        env_kwargs |= {**preset.env_kwargs, **own_kwargs}
    if isinstance(env_kwargs["model"], str) and is_factory(find_source(env_kwargs["model"])):
        env_kwargs["dtype"] = "float32"  # what a function makes has its own precision
    env_kwargs.pop("device")  # a field of the config, since the agent needs it too
    return Config(
        env=env_id,
        algo=algo,
        preset=preset_name,
        seed=0,
        images=preset.images,
        device="auto",
        **run_options,
        env_kwargs=find_paths(env_kwargs),
        algo_kwargs=find_algorithm_paths(own | chosen),
        policy_kwargs=policy_kwargs,
    )


def config_file(folder: Path) -> Path:
    """Returns the path of a run's config.

    Raises:
        FileNotFoundError: if the folder has none.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no {FILE_NAME}, as dpok train writes it")
    return path


def settings_of(owner: type) -> dict[str, Any]:
    """Returns the arguments of an algorithm or a policy that a run can set, with their defaults."""
    return {argument.name: argument.default for argument in describe_settings(owner)}


def describe_settings(owner: type) -> list[Argument]:
    """Returns the descriptions of the arguments of an algorithm or a policy that a run can set."""
    left_out = _NOT_POLICY_SETTINGS if issubclass(owner, DenoisingPolicy) else _NOT_SETTINGS
    arguments = describe_arguments(owner).values()
    # Arguments without a default, such as a policy's observation space, come from the algorithm.
    empty = inspect.Parameter.empty
    return [argument for argument in arguments if argument.name not in left_out and argument.default is not empty]


def find_paths(env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an environment's arguments with absolute paths, and with the reward as a dict."""
    # A run can be resumed from another working folder, where relative paths would name other files.
    resolved = dict(env_kwargs)
    resolved["reward"] = find_reward(resolved["reward"])
    if os.path.isfile(str(resolved["prompts"])):  # a prompt may be the name of a folder by chance
        resolved["prompts"] = _absolute(resolved["prompts"], list_prompt_sets())
    resolved["model"] = _absolute(resolved["model"], list_models())
    return resolved


def find_reward(reward: Any) -> dict[str, Any]:
    """Returns a reward, perhaps a text, as a dict with absolute paths."""
    return {_absolute(name, list_rewards()): weight for name, weight in parse_reward(reward).items()}


def find_algorithm_paths(algo_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an algorithm's arguments with absolute paths, and with the held-out reward as a dict unless it is "auto"
    or None."""
    resolved = dict(algo_kwargs)
    reward = resolved["held_out_reward"]
    resolved["held_out_reward"] = reward if reward in ("auto", None) else find_reward(reward)
    if resolved.get("choices") is not None:
        resolved["choices"] = os.path.abspath(check_path("--choices", resolved["choices"]))
    return resolved


def reward_names(held_out_reward: Any) -> list[str]:
    """Returns the rewards that a held-out reward is made of."""
    return [] if held_out_reward in ("auto", None) else list(parse_reward(held_out_reward))


def _absolute(text: Any, names: Collection[str]) -> Any:
    """Returns an existing path as an absolute one, and anything else as it is. Registered names are never paths."""
    is_path = isinstance(text, str) and text not in names and os.path.exists(text)
    return os.path.abspath(text) if is_path else text
