"""The pre-trained model as a policy, and as a frame of reference for actions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorActionWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from dpok_gym import diffusion
from dpok_gym.env import DenoisingEnv
from dpok_gym.vector_env import DenoisingVectorEnv, Observation

#: Bound of the standardised noise in the action space: ten standard deviations, never reached.
NOISE_BOUND = 10.0


def _acts_by_noise(env: gymnasium.Env | gymnasium.vector.VectorEnv) -> bool:
    """Whether one of the wrappers makes the action the standardised noise."""
    while isinstance(env, (gymnasium.Wrapper, gymnasium.vector.VectorWrapper)):
        if isinstance(env, (NoiseAction, VectorNoiseAction)):
            return True
        env = env.env
    return False


def _batch_of(env: gymnasium.Env | gymnasium.vector.VectorEnv) -> DenoisingVectorEnv:
    """The denoising environment inside any wrappers."""
    inner = env.unwrapped
    if isinstance(inner, DenoisingEnv):
        return inner.batch
    if isinstance(inner, DenoisingVectorEnv):
        return inner
    raise TypeError(f"expected a denoising environment such as DPOK-Shapes-v0, got {inner}")


def _act(batch: DenoisingVectorEnv, observation: Observation, noise: NDArray[np.float32]) -> NDArray[np.float32]:
    """x_{t-1} = mean + std * noise under the pre-trained model; all (n, C, h, w)."""
    if noise.shape != observation["latent"].shape:
        raise ValueError(f"expected noise of the latents' shape {observation['latent'].shape}, got {noise.shape}")
    mean, std = batch.pretrained_transition(observation)
    return diffusion.sample_with_log_prob(mean, std, torch.from_numpy(noise))[0].numpy()


def pretrained_policy(
    env: gymnasium.Env | gymnasium.vector.VectorEnv, seed: int | None = None
) -> Callable[[Observation], NDArray[np.float32]]:
    """The pre-trained model as a policy: a function from an observation to a sample of the action.

    Args:
        env: a denoising environment, scalar or vector, wrapped or not; its sampler settings are used.
        seed: of the sampling noise.

    Returns:
        A function that takes an observation of ``env`` and returns an action for it.
    """
    batch = _batch_of(env)
    rng = np.random.default_rng(seed)
    latent_dims = len(batch.model.latent_shape)
    acts_by_noise = _acts_by_noise(env)

    def policy(observation: Observation) -> NDArray[np.float32]:
        noise = rng.standard_normal(observation["latent"].shape, np.float32)
        if acts_by_noise:
            return noise
        if noise.ndim > latent_dims:
            return _act(batch, observation, noise)
        return _act(batch, {name: np.asarray(value)[None] for name, value in observation.items()}, noise[None])[0]

    return policy


class NoiseAction(gymnasium.ActionWrapper, RecordConstructorArgs):
    """The action is the noise of the step in units of its standard deviation, not the next latent.

    x_{t-1} = mean(x_t, t, z) + std(t) * action with the pre-trained model's mean, so an action drawn from N(0, I) is
    the pre-trained sampler, and a standard-sized policy of an RL library starts near it. The action space is a ``Box``
    of the latent's shape within +-10. Costs a call of the denoiser per step.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._batch = _batch_of(env)
        self.action_space = spaces.Box(-NOISE_BOUND, NOISE_BOUND, self._batch.model.latent_shape, np.float32)
        self._observation: Observation | None = None

    def reset(self, **kwargs: Any) -> tuple[Observation, dict[str, Any]]:
        """Resets, and remembers where the first action starts from."""
        self._observation, info = self.env.reset(**kwargs)
        return copy.deepcopy(self._observation), info

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, Any, bool, bool, dict[str, Any]]:
        """Takes a standardised noise (C, h, w)."""
        self._observation, reward, terminated, truncated, info = super().step(action)
        return copy.deepcopy(self._observation), reward, terminated, truncated, info

    def action(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        """The next latent for a standardised noise (C, h, w)."""
        if self._observation is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        noise = np.asarray(action, np.float32)[None]
        return _act(self._batch, {name: np.asarray(value)[None] for name, value in self._observation.items()}, noise)[0]


class VectorNoiseAction(VectorActionWrapper):
    """:class:`NoiseAction` for the vector environment: actions (n, C, h, w), one call of the denoiser for all."""

    def __init__(self, env: gymnasium.vector.VectorEnv) -> None:
        super().__init__(env)
        self._batch = _batch_of(env)
        shape = self._batch.model.latent_shape
        self.single_action_space = spaces.Box(-NOISE_BOUND, NOISE_BOUND, shape, np.float32)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._observation: Observation | None = None

    def reset(self, **kwargs: Any) -> tuple[Observation, dict[str, Any]]:
        """Resets, and remembers where the first actions start from."""
        self._observation, infos = self.env.reset(**kwargs)
        return copy.deepcopy(self._observation), infos

    def step(self, actions: NDArray[np.float32]) -> Any:
        """Takes standardised noises (n, C, h, w)."""
        self._observation, *rest = super().step(actions)
        return copy.deepcopy(self._observation), *rest

    def actions(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """The next latents for standardised noises (n, C, h, w)."""
        if self._observation is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        return _act(self._batch, self._observation, np.asarray(actions, np.float32))
