"""The environment for one image."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from dpok_gym.id_settings import MadeById
from dpok_gym.models import TextToImageModel
from dpok_gym.prompts import PromptSet
from dpok_gym.rewards import Reward
from dpok_gym.vector_env import DenoisingVectorEnv, Observation


class DenoisingEnv(MadeById, gymnasium.Env[Observation, NDArray[np.float32]]):  # type: ignore[misc]
    """Denoises one image step by step, for a reward at the end.

    ## Description

    A diffusion model draws an image by removing noise T times. Each removal is a sample from a Gaussian
    p(x_{t-1} | x_t, z) that depends on the prompt z. Seen as a Markov decision process (Black et al. 2024, Fan et al.
    2023), that sample is the action, and the policy chooses it: first the pre-trained model
    (:func:`dpok_gym.reference_policy`), then the model that reinforcement learning makes of it.

    ## Action Space

    The next latent x_{t-1} itself: a ``Box`` of the model's latent shape, float32, ``(4, 8, 8)`` for the embedded model
    and ``(4, 64, 64)`` for Stable Diffusion 1.5. The bounds of +-100 are never reached: latents have a standard
    deviation of about 1, and some libraries need bounds. In :class:`dpok_gym.NoiseAction` the action is the noise of
    the step instead, and zero means the pre-trained model's mean.

    ## Observation Space

    A ``Dict``:

    | Key      | Meaning                                             | Space                          | Unit        |
    |----------|-----------------------------------------------------|--------------------------------|-------------|
    | `latent` | x_t: noise at first, the finished latent at the end | `Box(-inf, inf, latent_shape)` | about std 1 |
    | `step`   | denoising steps done                                | `Discrete(T)`                  | steps       |
    | `prompt` | the prompt z as UTF-8, filled up with zeros         | `Box(0, 255, (L,), uint8)`     | byte        |

    L is the argument `max_prompt_bytes`. :class:`dpok_gym.TextFeatures` shows the text encoder's features of the prompt
    instead, for networks that cannot read bytes.

    ## Rewards

    0 at every step but the last one; then the reward of the decoded image for its prompt. The last ``info`` has
    ``image`` (uint8, (H, W, 3)), ``rewards`` (each component by name, before weighting), ``prompt`` (the text) and
    ``reward_valid`` (False if the reward was not finite and ``non_finite="mask"``).

    With ``reference_info=True`` each step's ``info`` has ``reference_mean`` (the latent's shape, float32) and
    ``reference_std`` of the pre-trained model's Gaussian, and ``log_prob_reference``: log p_pre(x_{t-1} | x_t, z) of
    the action, in nats of the whole latent. A deterministic step has no density: its std and ``log_prob_reference``
    are 0.

    With ``predicted_info=True`` the ``info`` of ``reset()`` and of each step has ``predicted`` (uint8, (H, W, 3)): the
    image that the pre-trained model expects, its prediction of x_0, given the latent that is observed. After the last
    step it is the finished image.

    With ``reference_log_prob_coef=beta`` each step's reward gets beta * log p_pre(x_{t-1} | x_t, z). The KL to the
    pre-trained model is -E[log p_pre] - H, where H is the entropy of the policy's steps. So an agent that maximises
    the undiscounted reward plus beta * H (maximum-entropy RL, temperature beta) solves E[r] - beta KL, Eq. 8 of DPOK,
    without access to the pre-trained model. The numbers are large: a latent of D dimensions has about
    -D (log std + 1.42) nats at each step. ``optimal_value(beta)`` is the best E[r] - beta KL, where it is known.

    ## Starting State

    A prompt drawn from the prompt set by its weights, and x_T ~ N(0, I), both from the environment's ``np_random``.
    ``reset(options={"prompt": text})`` takes any prompt that the model can read, and ``{"latent": x_T}`` given noise.
    ``info["prompt"]`` is the prompt.

    ## Episode End

    ``terminated`` after exactly T steps. ``truncated`` is never true.

    ## Arguments

    | Name                      | Default               | Effect                                                     |
    |---------------------------|-----------------------|------------------------------------------------------------|
    | `model`                   | the embedded one      | a registered name, a folder, file or hub id, or a model    |
    | `prompts`                 | the embedded world's  | a named set, a text, a list of texts, or a file            |
    | `reward`                  | the embedded world's  | a name, `http://` address, `{name: weight}`, or a callable |
    | `num_inference_steps`     | 20                    | T: more steps, finer images, longer episodes               |
    | `sampler`                 | `"ddim"`              | or `"ode"`; flow models also have `"flow-sde"`, ...        |
    | `eta`                     | the sampler's         | amount of noise; for DDIM at most 1, that of the posterior |
    | `sde_steps`               | None                  | first stochastic step and their number; None for all       |
    | `guidance_scale`          | 1.0                   | classifier-free guidance of the acting policy; 1 is none   |
    | `negative_prompt`         | None                  | text that guidance leads away from                         |
    | `image_size`              | None                  | pixels of a side, or (height, width); None: as trained     |
    | `long_prompts`            | `"error"`             | `"truncate"` or `"skip"` prompts too long for the model    |
    | `timestep_spacing`        | None                  | `"leading"`, `"trailing"`; None: as the model's scheduler  |
    | `device`, `dtype`         | `"auto"`, `"float32"` | where the networks run, and their weights' precision       |
    | `model_kwargs`            | None                  | of `load_model()`: `revision`, `variant`, `compile`, ...   |
    | `max_prompt_bytes`        | 512                   | L, bytes of the observed prompt                            |
    | `non_finite`              | `"error"`             | `"mask"` lets a run survive rewards that are NaN           |
    | `decode_batch_size`       | 1                     | images decoded at a time; above 1, last bits may differ    |
    | `reward_workers`          | 0                     | threads for the reward, in the vector environment          |
    | `reference_info`          | False                 | the pre-trained Gaussian in `info`; one more denoiser call |
    | `reference_log_prob_coef` | 0.0                   | beta of the reward term beta * log p_pre; the same cost    |
    | `predicted_info`          | False                 | the predicted image in `info`; one more denoiser call      |
    | `render_mode`             | None                  | see below                                                  |

    ## Render Modes

    A frame shows the state x_t, decoded, and beside it the image that the pre-trained model expects, its prediction of
    x_0. The first frame is noise beside a blurred image; the last one has the finished image twice. A frame costs a
    call of the denoiser and two decodings.

    | Mode               | `render()` returns                                                        |
    |--------------------|---------------------------------------------------------------------------|
    | `"rgb_array"`      | the frame, (H, 2 W, 3) uint8                                              |
    | `"rgb_array_list"` | the frames since the last call or `reset()`; of `gymnasium.make()` only   |
    | `"human"`          | None; `reset()` and `step()` show the frame in a window (extra `human`)   |

    ## References

    Fan et al. (2023), DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models.
    Black et al. (2024), Training Diffusion Models with Reinforcement Learning.
    Song et al. (2021), Denoising Diffusion Implicit Models.

    ## Version History

    * v0: the first version; since 0.2.0 the prompt is observed as bytes and not as tokens.
    """

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 10}  # noqa: RUF012 (gymnasium's own declaration)

    def __init__(self, *, render_mode: str | None = None, **kwargs: Any) -> None:
        if "autoreset_mode" in kwargs:
            raise TypeError("one environment does not reset itself: autoreset_mode is an argument of make_vec()")
        self.render_mode = render_mode
        self._batch = DenoisingVectorEnv(1, render_mode=render_mode, **kwargs)
        self.observation_space = self._batch.single_observation_space
        self.action_space = self._batch.single_action_space

    @property
    def batch(self) -> DenoisingVectorEnv:
        """The batch of one that does the work: its process, prompts, reward and judge."""
        return self._batch

    @property
    def model(self) -> TextToImageModel:  # type: ignore[override]
        """The text-to-image model."""
        return self._batch.model

    @property
    def reward(self) -> Reward:
        """The reward of finished images."""
        return self._batch.reward

    @property
    def prompts(self) -> PromptSet:
        """The prompts that episodes draw from."""
        return self._batch.prompts

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draws a prompt and x_T.

        Args:
            seed: of the environment's generator; None leaves it as it is.
            options: ``{"prompt": text}`` and ``{"latent": x_T}``, (C, h, w), choose one of the two, or both together.

        Raises:
            ValueError: if an option is unknown or wrong, or the model cannot read the prompt.
        """
        super().reset(seed=seed)
        observation, infos = self._batch.begin_episodes([self.np_random], options)
        return _first(observation), infos[0]

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Takes the next latent x_{t-1} (C, h, w).

        Raises:
            gymnasium.error.ResetNeeded: if no episode has begun, or the last one is over.
            ValueError: if the action has another shape or is not finite, or the reward is not finite.
        """
        observation, rewards, ended, infos = self._batch.advance(np.asarray(action)[None])
        return _first(observation), float(rewards[0]), bool(ended[0]), False, infos[0]

    def optimal_value(self, beta: float) -> float:
        """Returns the largest E[r] - beta KL; see :meth:`dpok_gym.DenoisingVectorEnv.optimal_value`."""
        return self._batch.optimal_value(beta)

    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        """Draws the current state as the render mode says; see the class.

        Raises:
            gymnasium.error.ResetNeeded: before the first :meth:`reset`.
        """
        frames = self._batch.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Closes the window, and ends the threads that compute rewards, if there are any."""
        self._batch.close()


def _first(observation: Observation) -> Observation:
    return {name: values[0] for name, values in observation.items()}
