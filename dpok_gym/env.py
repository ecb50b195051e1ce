"""The scalar environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from dpok_gym.prompts import PromptSet
from dpok_gym.rewards import Reward
from dpok_gym.vector_env import DenoisingVectorEnv, Observation


class DenoisingEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """Denoising one picture, step by step, for a reward at the end.

    ## Description

    A diffusion model draws a picture by removing noise from it T times. Each removal is a sample from a Gaussian
    p(x_{t-1} | x_t, z) that depends on the prompt z. Seen as a Markov decision process (Black et al. 2024, Fan et al.
    2023), that sample is the action, and whoever chooses it is the policy: the pre-trained model to begin with
    (:func:`dpok_gym.pretrained_policy`), then the model that reinforcement learning makes of it.

    ## Action Space

    The next latent x_{t-1} itself, a ``Box`` of the model's latent shape, ``(4, 8, 8)`` for the embedded model and
    ``(4, 64, 64)`` for Stable Diffusion 1.5, float32. The bounds of +-100 are there because some libraries ask for
    them: latents have a standard deviation of about 1. Wrap the environment in :class:`dpok_gym.NoiseAction` to act by
    the standardised noise instead, where zero means the pre-trained model's mean.

    ## Observation Space

    A ``Dict``:

    | Key      | Meaning                                       | Space                                 | Unit        |
    |----------|-----------------------------------------------|---------------------------------------|-------------|
    | `latent` | x_t, noisy at first, the picture's in the end | `Box(-inf, inf, latent_shape)`        | about std 1 |
    | `step`   | denoising steps done                          | `Discrete(T)`                         | steps       |
    | `prompt` | the prompt z as the model's token ids         | `Box(0, vocab_size - 1, (L,), int64)` | token       |

    L is the model's number of tokens, 16 for the embedded model and 77 for Stable Diffusion.

    ## Rewards

    0 at every step but the last one; then the reward of the decoded picture for its prompt. The last ``info`` holds
    ``image`` (uint8, (H, W, 3)), ``rewards`` (each component by name, before weighting), ``prompt`` (the text) and
    ``reward_valid`` (False if the reward was not finite and ``non_finite="mask"``).

    ## Starting State

    A prompt drawn from the prompt set by its weights, and x_T ~ N(0, I), both from the environment's ``np_random``.
    ``reset(options={"prompt": text})`` takes any prompt that the model can read; ``info["prompt"]`` says which it is.
    The option ``{"latent": x_T}`` starts from given noise.

    ## Episode End

    ``terminated`` after exactly T steps. ``truncated`` is never true.

    ## Arguments

    | Name                  | Default               | Effect                                                        |
    |-----------------------|-----------------------|---------------------------------------------------------------|
    | `model`               | `"shapes"`            | a registered name, a folder, file or hub id, or a model       |
    | `prompts`             | `"shapes"`            | a named set, a text, a list of texts, or a file               |
    | `reward`              | `"shapes-alignment"`  | a name, `http://` address, `{name: weight}`, or a callable    |
    | `num_inference_steps` | 20                    | T: more steps, finer pictures, longer episodes                |
    | `eta`                 | 1.0                   | noise in (0, 1]; 1 is that of the posterior                   |
    | `guidance_scale`      | 1.0                   | classifier-free guidance of the acting policy; 1 is none      |
    | `negative_prompt`     | None                  | what guidance leads away from                                 |
    | `image_size`          | None                  | pixels of a side, or (height, width); None: as trained        |
    | `device`, `dtype`     | `"auto"`, `"float32"` | where the networks run, and their weights' precision          |
    | `model_kwargs`        | None                  | of `load_model()`: `revision`, `variant`, `compile`, ...      |
    | `non_finite`          | `"error"`             | `"mask"` lets a run survive rewards that are NaN              |
    | `decode_batch_size`   | 1                     | pictures decoded at a time; else not bit for bit the same     |
    | `reward_workers`      | 0                     | threads for the reward, in the vector environment             |
    | `render_mode`         | None                  | `"rgb_array"`: the current state x_t, decoded                 |

    ## References

    Fan et al. (2023), DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models.
    Black et al. (2024), Training Diffusion Models with Reinforcement Learning.
    Song et al. (2021), Denoising Diffusion Implicit Models.

    ## Version History

    * v0: the first version.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (gymnasium's own declaration)

    def __init__(self, *, render_mode: str | None = None, **kwargs: Any) -> None:
        self.render_mode = render_mode
        self._batch = DenoisingVectorEnv(1, render_mode=render_mode, **kwargs)
        self.observation_space = self._batch.single_observation_space
        self.action_space = self._batch.single_action_space

    @property
    def batch(self) -> DenoisingVectorEnv:
        """The batch of one that does the work: its model, schedule, prompts, reward and sampler."""
        return self._batch

    @property
    def reward(self) -> Reward:
        """What judges the pictures."""
        return self._batch.reward

    @property
    def prompts(self) -> PromptSet:
        """What prompts are drawn from."""
        return self._batch.prompts

    @property
    def sampler(self) -> dict[str, Any]:
        """What a policy must know to act here, as plain JSON-able values."""
        return self._batch.sampler

    def state_dict(self) -> dict[str, Any]:
        """What going on exactly needs: the generator's state, and the statistics that rewards are normalised by."""
        return self._batch.state_dict([self.np_random])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with what :meth:`state_dict` returned."""
        self._batch.load_state_dict(state, [self.np_random])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draws a prompt and the noise; ``options={"prompt": text, "latent": x_T}`` chooses either or both."""
        super().reset(seed=seed)
        observation, infos = self._batch.begin_episodes([self.np_random], options)
        return _first(observation), infos[0]

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Takes the next latent x_{t-1} (C, h, w)."""
        observation, rewards, terminated, infos = self._batch.advance(np.asarray(action)[None])
        return _first(observation), float(rewards[0]), terminated, False, infos[0]

    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        """The current state x_t, decoded: (H, W, 3) uint8."""
        frames = self._batch.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Ends the threads that judge, if there are any."""
        self._batch.close()


def _first(observation: Observation) -> Observation:
    return {name: values[0] for name, values in observation.items()}
