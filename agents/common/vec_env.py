"""Vector environments in the interface that Stable-Baselines3 asks for, and the denoising environment inside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from dpok_gym.env import DenoisingEnv
from dpok_gym.vector_env import DenoisingVectorEnv


class GymnasiumVecEnv(VecEnv):
    """Steps a Gymnasium ``VectorEnv`` as a Stable-Baselines3 ``VecEnv``.

    Args:
        env: a vector environment that resets itself in the step that ends an episode (``AutoresetMode.SAME_STEP``), the
            only mode that Stable-Baselines3 knows.

    Raises:
        ValueError: if it resets itself in another way.
    """

    def __init__(self, env: VectorEnv) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(f"the vector environment must have autoreset mode SAME_STEP, it has {mode}")
        self.venv = env
        self._actions: np.ndarray | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> VecEnvObs:
        """Resets all environments, with the seeds given to :meth:`seed` the first time after it."""
        seeds = self._seeds if any(seed is not None for seed in self._seeds) else None
        observation, infos = self.venv.reset(seed=seeds, options=self._batched_options())  # type: ignore[arg-type]
        self.reset_infos = [_info_of(infos, i) for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observation

    def _batched_options(self) -> dict[str, Any] | None:
        """Returns the reset options of all environments as one dict: values for all, or lists of values."""
        options: Any = self._options[0]
        if all(each is options for each in self._options):
            return options or None
        if any(each.keys() != options.keys() for each in self._options):
            raise ValueError(
                "the reset options must have the same names for all environments, got "
                f"{[sorted(each) for each in self._options]}"
            )
        return {name: [each[name] for each in self._options] for name in options} or None

    def step_async(self, actions: np.ndarray) -> None:
        """Remembers the actions, (n, ...)."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Takes them. At an episode's end, ``infos[i]`` is its last info, with ``terminal_observation``."""
        observation, rewards, terminated, truncated, infos = self.venv.step(self._actions)
        dones = terminated | truncated
        split = [_info_of(infos, i) for i in range(self.num_envs)]
        for i in np.flatnonzero(dones).tolist():
            # Gymnasium keeps the end of an episode apart; SB3 expects it in the info of the step.
            terminal, last = split[i].pop("final_obs"), split[i].pop("final_info")
            self.reset_infos[i] = split[i]  # the rest comes from the reset
            split[i] = last | {"terminal_observation": terminal}
        for i, info in enumerate(split):
            info["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return observation, np.asarray(rewards, np.float32), dones, split

    def close(self) -> None:
        """Closes the environments."""
        self.venv.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Returns one rendered frame for each environment."""
        frames = self.venv.render()
        return [None] * self.num_envs if frames is None else list(frames)  # type: ignore[arg-type]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Returns the attribute of each environment; an attribute of the whole batch is repeated."""
        value = getattr(self._owner_of(attr_name), attr_name)
        chosen = list(self._get_indices(indices))
        return [value[i] if attr_name == "np_random" else value for i in chosen]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute of all environments; they cannot differ."""
        setattr(self._owner_of(attr_name), attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Calls a method of the batch once, and repeats its result."""
        result = getattr(self._owner_of(method_name), method_name)(*args, **kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Always False: wrappers of single environments cannot wrap a batch."""
        return [False for _ in self._get_indices(indices)]

    def _owner_of(self, name: str) -> VectorEnv:
        """Returns the outermost wrapped environment with this attribute; wrappers do not pass attributes on."""
        env = self.venv
        while isinstance(env, VectorWrapper) and not hasattr(env, name):
            env = env.env
        return env

    def _get_indices(self, indices: VecEnvIndices) -> Iterable[int]:
        if indices is None:
            return range(self.num_envs)
        return [indices] if isinstance(indices, int) else indices


def _info_of(infos: dict[str, Any], index: int) -> dict[str, Any]:
    """Returns the info of one environment out of Gymnasium's batched infos."""
    info = {}
    for key, values in infos.items():
        is_there = infos.get(f"_{key}")
        if key.startswith("_") or (is_there is not None and not is_there[index]):
            continue
        info[key] = _info_of(values, index) if isinstance(values, dict) else values[index]
    return info


def find_denoising_env(env: Any) -> DenoisingVectorEnv:
    """Returns the denoising environment that an agent draws its images with.

    An agent draws whole trajectories on the model's device and does not step the environment. So a wrapper that
    changes observations, actions or rewards would have no effect, and is refused, as is a subclass that steps in its
    own way.

    Args:
        env: a denoising environment, scalar or vector, or SB3's vector of one.

    Raises:
        ValueError: if there is no denoising environment inside, a wrapper is around it, it steps in its own way, or its
            reward has the pre-trained model's log-probability in it.
    """
    layers = [env]
    while not isinstance(layers[-1], (DenoisingVectorEnv, DenoisingEnv)):
        inner = _unwrap(layers[-1])
        if inner is None:
            raise ValueError(
                f"an agent needs a denoising environment such as DPOK-SD15-v0, got {env}; make many at a time with "
                "gymnasium.make_vec, without vectorization_mode"
            )
        layers.append(inner)
    for layer in layers[:-1]:
        if not _is_transparent(layer):
            raise ValueError(
                f"an agent draws its images itself and would not notice the wrapper {type(layer).__name__}; take it "
                "off. The action is the next latent; rewards are changed with the environment's argument reward"
            )
    found = layers[-1]
    for method in ("step", "reset"):
        of_base = DenoisingEnv if isinstance(found, DenoisingEnv) else DenoisingVectorEnv
        if getattr(type(found), method) is not getattr(of_base, method):
            raise ValueError(
                f"an agent draws its images itself and would not notice {type(found).__name__}.{method}(): leave it "
                "out; rewards are changed with the environment's argument reward"
            )
    batch = found.batch if isinstance(found, DenoisingEnv) else found
    if batch.reference_log_prob_coef:
        raise ValueError(
            "an agent draws its images itself and would not notice the environment's reference_log_prob_coef; leave "
            "it at 0 and give the agent a kl_coef"
        )
    return batch


def _unwrap(env: Any) -> Any:
    """Returns what is one layer further in; None if there is nothing, or are several environments."""
    if isinstance(env, (GymnasiumVecEnv, VecEnvWrapper)):
        return env.venv
    if isinstance(env, DummyVecEnv) and env.num_envs == 1:
        return env.envs[0]
    if isinstance(env, (gymnasium.Wrapper, VectorWrapper)):
        return env.env
    return None


def _is_transparent(layer: Any) -> bool:
    """Returns whether a layer changes neither latents, actions nor rewards."""
    if isinstance(layer, (Monitor, VecMonitor)):
        return layer.results_writer is None  # its file would stay empty, as the environment is not stepped
    return isinstance(layer, (GymnasiumVecEnv, DummyVecEnv, OrderEnforcing, PassiveEnvChecker))
