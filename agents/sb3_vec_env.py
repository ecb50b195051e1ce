"""Gymnasium's vector environments in the interface that Stable-Baselines3 asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn


class GymVectorVecEnv(VecEnv):
    """Steps a Gymnasium ``VectorEnv`` as a Stable-Baselines3 ``VecEnv``.

    Args:
        env: a vector environment that resets itself in the step that ends an episode (``AutoresetMode.SAME_STEP``),
            which is the one mode that Stable-Baselines3 knows.

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
        options: Any = self._options[0]
        if any(each is not options for each in self._options):  # not one for all, but a list of them
            if any(each.keys() != options.keys() for each in self._options):
                raise ValueError(
                    "the reset options must have the same names for all environments, got "
                    f"{[sorted(each) for each in self._options]}"
                )
            options = {name: [each[name] for each in self._options] for name in options}
        observation, infos = self.venv.reset(seed=seeds, options=options or None)  # type: ignore[arg-type]
        self.reset_infos = [_info_of(infos, i) for i in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        """Remembers the actions, (n, ...)."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Takes them; at an episode's end, ``infos[i]`` is its last info and holds ``terminal_observation``."""
        observation, rewards, terminated, truncated, infos = self.venv.step(self._actions)
        dones = terminated | truncated
        split = [_info_of(infos, i) for i in range(self.num_envs)]
        for i in np.flatnonzero(dones).tolist():
            terminal, last = split[i].pop("final_obs"), split[i].pop("final_info")
            self.reset_infos[i] = split[i]  # what is left comes from the reset
            split[i] = last | {"terminal_observation": terminal}
        for i, info in enumerate(split):
            info["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return observation, np.asarray(rewards, np.float32), dones, split

    def close(self) -> None:
        """Closes the environments."""
        self.venv.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One rendered frame for each environment."""
        frames = self.venv.render()
        return [None] * self.num_envs if frames is None else list(frames)  # type: ignore[arg-type]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute of each environment; what the batch has once is repeated."""
        value = getattr(self._owner_of(attr_name), attr_name)
        chosen = list(self._get_indices(indices))
        return [value[i] if attr_name == "np_random" else value for i in chosen]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute of all environments; they cannot differ."""
        setattr(self._owner_of(attr_name), attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Calls a method of the batch once, and repeats what it returns."""
        result = getattr(self._owner_of(method_name), method_name)(*args, **kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Always False: wrappers of single environments cannot wrap a batch."""
        return [False for _ in self._get_indices(indices)]

    def _owner_of(self, name: str) -> VectorEnv:
        """The outermost of the wrapped environments that has this attribute; they do not pass it on themselves."""
        env = self.venv
        while isinstance(env, VectorWrapper) and not hasattr(env, name):
            env = env.env
        return env

    def _get_indices(self, indices: VecEnvIndices) -> Iterable[int]:
        if indices is None:
            return range(self.num_envs)
        return [indices] if isinstance(indices, int) else indices


def _info_of(infos: dict[str, Any], index: int) -> dict[str, Any]:
    """The info of one environment out of Gymnasium's batched infos."""
    return {
        key: _info_of(values, index) if isinstance(values, dict) else values[index]
        for key, values in infos.items()
        if not key.startswith("_") and infos.get(f"_{key}", [True] * (index + 1))[index]
    }
