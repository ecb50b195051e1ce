"""The pre-trained model as a policy, and wrappers for other people's agents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorActionWrapper, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from dpok_gym import diffusion
from dpok_gym.env import DenoisingEnv
from dpok_gym.prompts import prompts_from_bytes
from dpok_gym.utils.validation import check_integer
from dpok_gym.vector_env import DenoisingVectorEnv, Observation

#: Bound of the standardised noise in the action space: ten standard deviations, never reached.
NOISE_BOUND = 10.0

#: The largest squashed action whose noise is finite in float32.
_LARGEST_ACTION = np.nextafter(np.float32(1), np.float32(0))


def get_batch(env: gymnasium.Env | VectorEnv) -> DenoisingVectorEnv:
    """Returns the denoising environment inside any wrappers, as a batch.

    Raises:
        TypeError: if there is none inside.
    """
    inner = env.unwrapped
    if isinstance(inner, DenoisingEnv):
        return inner.batch
    if isinstance(inner, DenoisingVectorEnv):
        return inner
    raise TypeError(f"expected a denoising environment such as DPOK-SD15-v0, got {inner}")


def reference_policy(
    env: gymnasium.Env | VectorEnv, seed: int | None = None
) -> Callable[[Observation], NDArray[np.float32]]:
    """Makes a policy of the pre-trained model: a function from an observation to a sample of the action.

    Args:
        env: a denoising environment, scalar or vector, wrapped or not; its sampler settings are used.
        seed: of the sampling noise.

    Returns:
        A function that takes an observation of ``env`` and returns an action for it.

    Raises:
        TypeError: if ``env`` is no denoising environment, or shows text features or blocks of the latent while its
            actions are latents.
    """
    batch = get_batch(env)
    rng = np.random.default_rng(seed)
    noise_layer = _find_noise_layer(env)
    changed = (TextFeatures, VectorTextFeatures, CoarseLatent, VectorCoarseLatent)
    if noise_layer is None and any(isinstance(layer, changed) for layer in _layers(env)):
        raise TypeError(
            "the pre-trained model reads the prompt and the latent itself: take TextFeatures and CoarseLatent off, or "
            "act by noise"
        )

    def policy(observation: Observation) -> NDArray[np.float32]:
        noise = rng.standard_normal(env.action_space.shape, np.float32)
        if noise_layer is not None:
            return np.tanh(noise) if noise_layer.squashed else noise
        if isinstance(env.unwrapped, VectorEnv):
            return _act(batch, observation, noise)
        return _act(batch, _add_axis(observation), noise[None])[0]

    return policy


def _layers(env: Any) -> list[Any]:
    """Returns an environment and all that it wraps, from the outside to the inside."""
    layers = [env]
    while isinstance(env, (gymnasium.Wrapper, gymnasium.vector.VectorWrapper)):
        env = env.env
        layers.append(env)
    return layers


def _add_axis(observation: Observation) -> Observation:
    """Turns the observation of one environment into that of a batch of one."""
    return {name: np.asarray(value)[None] for name, value in observation.items()}


@torch.no_grad()
def _act(batch: DenoisingVectorEnv, observation: Observation, noise: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns x_{t-1} = mean + std * noise under the pre-trained model; all (n, C, h, w)."""
    if noise.shape != observation["latent"].shape:
        raise ValueError(f"expected noise of the latents' shape {observation['latent'].shape}, got {noise.shape}")
    mean, std = batch.process.transition(batch.state_of(observation))
    return diffusion.sample(mean, std, torch.as_tensor(noise, device=mean.device)).cpu().numpy()


def _find_noise_layer(env: Any) -> NoiseAction | VectorNoiseAction | None:
    """Returns the wrapper that takes actions by noise; None if there is none."""
    return next((layer for layer in _layers(env) if isinstance(layer, (NoiseAction, VectorNoiseAction))), None)


def _check_acts_by_latents(env: Any) -> None:
    """Refuses environments that already act by noise."""
    if _find_noise_layer(env) is not None:
        raise ValueError("the action is the noise already: wrap the environment in NoiseAction only once")


def _block_shape(batch: DenoisingVectorEnv, block_size: int) -> tuple[int, int, int]:
    """Returns (C, h / b, w / b), one entry for each b x b block of a latent; refuses other block sizes."""
    channels, height, width = batch.model.latent_shape
    check_integer("block_size", block_size, minimum=1)
    if height % block_size or width % block_size:
        raise ValueError(
            f"block_size must divide the latent's height and width, {height} and {width}; got {block_size}"
        )
    return channels, height // block_size, width // block_size


def _split_blocks(latents: NDArray[np.float32], block_size: int) -> NDArray[np.float32]:
    """Returns latents (n, C, h, w) as (n, C, h / b, b, w / b, b)."""
    n, channels, height, width = latents.shape
    return latents.reshape(n, channels, height // block_size, block_size, width // block_size, block_size)


def _noise_space(batch: DenoisingVectorEnv, squashed: bool, block_size: int) -> spaces.Box:
    bound = 1.0 if squashed else NOISE_BOUND
    return spaces.Box(-bound, bound, _block_shape(batch, block_size), np.float32)


@torch.no_grad()
def _take_noise(
    batch: DenoisingVectorEnv,
    actions: NDArray[np.float32],
    layer: NoiseAction | VectorNoiseAction,
    generators: Sequence[np.random.Generator],
) -> NDArray[np.float32]:
    """Returns the next latents x_{t-1} = mean + std * noise, (n, C, h, w), for actions (n, C, h / b, w / b)."""
    noise = np.asarray(actions, np.float32)
    expected = (batch.num_envs, *_block_shape(batch, layer.block_size))
    if noise.shape != expected:
        raise ValueError(f"expected noise of shape {expected}, got {noise.shape}")
    latents = np.zeros((batch.num_envs, *batch.model.latent_shape), np.float32)
    running = batch.running
    if not running.any():  # every episode is over, and autoreset uses no action
        return latents
    mean, std = batch.reference_transition()
    noise = _unsquash(noise) if layer.squashed else noise
    if layer.block_size > 1:
        fine = latents
        for i in np.flatnonzero(running).tolist():  # the others draw nothing, as an environment alone does not
            fine[i] = generators[i].standard_normal(fine.shape[1:], np.float32)
        noise = _replace_block_means(fine, noise)
    return diffusion.sample(mean, std, torch.as_tensor(noise, device=mean.device)).cpu().numpy()


def _replace_block_means(noise: NDArray[np.float32], coarse: NDArray[np.float32]) -> NDArray[np.float32]:
    """Changes the mean of each b x b block of noise (n, C, h, w) to coarse / b, with coarse (n, C, h / b, w / b).

    The sum of a block of N(0, I), divided by b, is N(0, 1). So if both are N(0, I), the result is as well.
    """
    size = noise.shape[2] // coarse.shape[2]
    blocks = _split_blocks(noise, size)
    shift = coarse[:, :, :, None, :, None] / size - blocks.mean(axis=(3, 5), keepdims=True)
    return (blocks + shift).reshape(noise.shape)


def _unsquash(actions: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns atanh(action); +-1, where it is infinite, count as the nearest float32, +-8.7 standard deviations."""
    return np.arctanh(actions.clip(-_LARGEST_ACTION, _LARGEST_ACTION))


def _log_slope(actions: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns log |d noise / d action| of squashed actions (n, C, h, w), summed over the dimensions, (n,).

    This is what turns the density of a noise into that of its action: -log(1 - action^2) in each dimension.
    """
    noise = np.abs(_unsquash(np.asarray(actions, np.float32)).astype(np.float64))
    return (2 * (noise + np.log1p(np.exp(-2 * noise)) - np.log(2))).reshape(len(noise), -1).sum(1)


class NoiseAction(gymnasium.ActionWrapper, RecordConstructorArgs):
    """Takes the noise of a step, in units of its standard deviation, as the action in place of the next latent.

    x_{t-1} = mean(x_t, t, z) + std(t) * noise, with the pre-trained model's mean. A noise drawn from N(0, I) is the
    pre-trained sampler, so a Gaussian policy of any RL library starts near it. The action is the noise, a ``Box`` of
    the latent's shape within +-10. A step costs a call of the denoiser.

    ``log_prob_reference`` in the info stays that of the latent. It differs from that of the noise by a number that
    depends on the step alone, so both lead to the same policy. If actions are squashed, it depends on the action too:
    the reward's term beta * log p_pre is then that of the action itself.

    With a block size b, the action has one number for each b x b block of each channel: the sum of the block's noise,
    divided by b. The environment draws the rest of the noise. N(0, I) is the pre-trained sampler here too. So a
    policy that knows nothing of images has fewer numbers to choose.

    Args:
        env: the environment.
        squashed: True for actions within +-1, of which the noise is atanh(action). This suits policies whose actions
            are squashed by tanh, such as SAC's: where they start with tanh(N(0, I)), they are the pre-trained sampler.
        block_size: b, a divisor of the latent's height and width.

    Raises:
        ValueError: if the environment already acts by noise, or the block size is no such divisor.
    """

    def __init__(self, env: gymnasium.Env, squashed: bool = False, block_size: int = 1) -> None:
        RecordConstructorArgs.__init__(self, squashed=squashed, block_size=block_size)
        _check_acts_by_latents(env)
        super().__init__(env)
        self.squashed, self.block_size = squashed, block_size
        self._batch = get_batch(env)
        self.action_space = _noise_space(self._batch, squashed, block_size)

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, Any, bool, bool, dict[str, Any]]:
        """Takes a standardised noise (C, h / b, w / b).

        Raises:
            gymnasium.error.ResetNeeded: before the first :meth:`reset`.
            ValueError: if the noise has another shape.
        """
        observation, reward, terminated, truncated, info = super().step(action)
        if self.squashed and self._batch.reference_log_prob_coef:
            reward = float(reward) + self._batch.reference_log_prob_coef * float(_log_slope(action[None])[0])
        return observation, reward, terminated, truncated, info

    def action(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the next latent (C, h, w) for a standardised noise (C, h / b, w / b)."""
        return _take_noise(self._batch, np.asarray(action)[None], self, [self.unwrapped.np_random])[0]


class VectorNoiseAction(VectorActionWrapper):
    """:class:`NoiseAction` for the vector environment: actions (n, C, h / b, w / b), one denoiser call for all."""

    def __init__(self, env: VectorEnv, squashed: bool = False, block_size: int = 1) -> None:
        _check_acts_by_latents(env)
        super().__init__(env)
        self.squashed, self.block_size = squashed, block_size
        self._batch = get_batch(env)
        self.single_action_space = _noise_space(self._batch, squashed, block_size)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def step(self, actions: NDArray[np.float32]) -> Any:
        """Takes standardised noises (n, C, h / b, w / b); errors as :meth:`NoiseAction.step`."""
        running = self._batch.running  # an action at an episode's end, which autoreset may ask for, is not used
        observation, rewards, *rest = super().step(actions)
        if self.squashed and self._batch.reference_log_prob_coef:
            rewards = rewards + self._batch.reference_log_prob_coef * np.where(running, _log_slope(actions), 0.0)
        return observation, rewards, *rest

    def actions(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the next latents (n, C, h, w) for standardised noises (n, C, h / b, w / b)."""
        return _take_noise(self._batch, actions, self, self._batch.np_random)


def _check_shows(env: Any, name: str, *wrappers: type) -> None:
    """Refuses environments whose observations one of these wrappers has changed already."""
    if any(isinstance(layer, wrappers) for layer in _layers(env)):
        raise ValueError(
            f"the observation has {name} already: wrap the environment in {wrappers[0].__name__} only once"
        )


def _change_space(space: Any, name: str, part: spaces.Box) -> spaces.Dict:
    """Returns the space of an observation in which a part is another one."""
    return spaces.Dict({**space.spaces, name: part})


# Gymnasium's VectorObservationWrapper refuses the autoreset mode SAME_STEP, because it changes no observations in the
# infos. Here step() changes these too, so the base class is the plain VectorWrapper.
class _VectorObservationWrapper(VectorWrapper):
    """Changes the observations (n, ...), those in the infos of finished episodes too."""

    def __init__(self, env: VectorEnv, name: str, part: spaces.Box) -> None:
        super().__init__(env)
        self._batch = get_batch(env)
        self.single_observation_space = _change_space(env.single_observation_space, name, part)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def observations(self, observation: Observation) -> Observation:
        """Returns the changed observation of a batch."""
        raise NotImplementedError

    def reset(self, **kwargs: Any) -> tuple[Observation, dict[str, Any]]:
        """Resets; the first observations are changed."""
        observation, infos = self.env.reset(**kwargs)
        return self.observations(observation), infos

    def step(self, actions: NDArray[Any]) -> Any:
        """Takes actions (n, C, h, w); the last observations of finished episodes are changed too."""
        observation, rewards, terminated, truncated, infos = self.env.step(actions)
        for last in infos.get("final_obs", ()):
            if last is not None:
                last.update(_without_axis(self.observations(_add_axis(last))))
        return self.observations(observation), rewards, terminated, truncated, infos


def _without_axis(observation: Observation) -> Observation:
    """Turns the observation of a batch of one into that of one environment."""
    return {name: values[0] for name, values in observation.items()}


def _feature_space(env: Any) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (get_batch(env).model.text_width,), np.float32)


@torch.no_grad()
def _show_features(batch: DenoisingVectorEnv, observation: Observation) -> Observation:
    """Replaces the prompts (n, L) in bytes by the text encoder's features (n, F)."""
    conditioning = batch.process.encode(prompts_from_bytes(observation["prompt"]))
    return {**observation, "prompt": batch.model.text_features(conditioning).float().cpu().numpy()}


class TextFeatures(gymnasium.ObservationWrapper, RecordConstructorArgs):
    """Shows the prompt as F features of the model's text encoder, ``Box(-inf, inf, (F,), float32)``, not as bytes.

    For other people's networks, which would read bytes as magnitudes. Agents of ``agents`` need no wrapper. The
    features are the encoder's own. They are about as large as the latent's numbers, so they are not scaled.

    Raises:
        ValueError: if the environment shows the features already.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        RecordConstructorArgs.__init__(self)
        _check_shows(env, "text features", TextFeatures, VectorTextFeatures)
        super().__init__(env)
        self.observation_space = _change_space(env.observation_space, "prompt", _feature_space(env))

    def observation(self, observation: Observation) -> Observation:
        """Replaces the prompt (L,) by its features (F,)."""
        return _without_axis(_show_features(get_batch(self.env), _add_axis(observation)))


class VectorTextFeatures(_VectorObservationWrapper):
    """:class:`TextFeatures` for the vector environment: the prompts (n, L) become features (n, F)."""

    def __init__(self, env: VectorEnv) -> None:
        _check_shows(env, "text features", TextFeatures, VectorTextFeatures)
        super().__init__(env, "prompt", _feature_space(env))

    def observations(self, observation: Observation) -> Observation:
        """Replaces the prompts."""
        return _show_features(self._batch, observation)


def _block_space(env: Any, block_size: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, _block_shape(get_batch(env), block_size), np.float32)


def _show_blocks(observation: Observation, block_size: int) -> Observation:
    """Replaces the latents (n, C, h, w) by sums over their blocks, divided by b, (n, C, h / b, w / b)."""
    return {**observation, "latent": _split_blocks(observation["latent"], block_size).sum((3, 5)) / block_size}


class CoarseLatent(gymnasium.ObservationWrapper, RecordConstructorArgs):
    """Shows the latent as one number for each b x b block of each channel: the sum of the block, divided by b.

    The size of x_T's numbers stays that of N(0, 1). This goes with the actions of ``NoiseAction(block_size=b)``: the
    agent sees what it moves.

    Args:
        env: the environment.
        block_size: b, a divisor of the latent's height and width.

    Raises:
        ValueError: if the environment shows blocks already, or the block size is no such divisor.
    """

    def __init__(self, env: gymnasium.Env, block_size: int) -> None:
        RecordConstructorArgs.__init__(self, block_size=block_size)
        _check_shows(env, "blocks of the latent", CoarseLatent, VectorCoarseLatent)
        super().__init__(env)
        self.block_size = block_size
        self.observation_space = _change_space(env.observation_space, "latent", _block_space(env, block_size))

    def observation(self, observation: Observation) -> Observation:
        """Replaces the latent (C, h, w) by its blocks (C, h / b, w / b)."""
        return _without_axis(_show_blocks(_add_axis(observation), self.block_size))


class VectorCoarseLatent(_VectorObservationWrapper):
    """:class:`CoarseLatent` for the vector environment: (n, C, h, w) become (n, C, h / b, w / b)."""

    def __init__(self, env: VectorEnv, block_size: int) -> None:
        _check_shows(env, "blocks of the latent", CoarseLatent, VectorCoarseLatent)
        super().__init__(env, "latent", _block_space(env, block_size))
        self.block_size = block_size

    def observations(self, observation: Observation) -> Observation:
        """Replaces the latents."""
        return _show_blocks(observation, self.block_size)
