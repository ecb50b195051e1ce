"""Denoising as a batched Markov decision process. The only code that steps it.

Letters used for shapes: n environments, B images, T denoising steps, L bytes of a prompt, C x h x w a latent, H x W an
image.
"""

from __future__ import annotations

import inspect
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from dpok_gym.judging import ImageJudge, Outcome, make_info
from dpok_gym.models import TextToImageModel
from dpok_gym.models.loading import find_model
from dpok_gym.prompts import PromptSet, load_prompts, prompt_to_bytes, prompts_from_bytes
from dpok_gym.registration import DEFAULT_ENVIRONMENT, ENVIRONMENTS
from dpok_gym.reset_options import read_reset_options
from dpok_gym.rewards import Reward, make_reward
from dpok_gym.samplers import DenoisingProcess, State
from dpok_gym.utils.images import to_uint8
from dpok_gym.utils.validation import check_integer, suggest
from dpok_gym.worlds import World, find_world

Observation = dict[str, NDArray[Any]]

#: Bound of each latent dimension in the action space. Stable-Baselines3 asks for one; a latent has a standard deviation
#: of about 1, so no action reaches it.
LATENT_BOUND = 100.0

#: Prompts that are encoded when the environment is made; a longer list is encoded as its prompts are drawn.
_MAX_PROMPTS_ENCODED_AHEAD = 512

_DEFAULTS = ENVIRONMENTS[DEFAULT_ENVIRONMENT]


class DenoisingVectorEnv(VectorEnv[Observation, NDArray[np.float32], NDArray[Any]]):
    """``num_envs`` images denoised side by side. :class:`dpok_gym.env.DenoisingEnv` documents the decision process.

    All environments start together and last T steps, so they are always at the same step. Autoreset is ``SAME_STEP``:
    the step that finishes the images returns the first observation of the next episodes. The last observation is in
    ``infos["final_obs"]``, images and rewards are in ``infos["final_info"]``.

    ``reset()`` and ``step()`` exchange NumPy arrays. A learner that draws whole trajectories on the model's device does
    not need them: it uses :attr:`process`, :attr:`prompts` and :meth:`judge`.

    Args:
        num_envs: n, the number of images denoised side by side, at least 1.
        model: a registered name, a folder, a file or a hub id for :func:`dpok_gym.models.load_model`; or a loaded
            model, such as ``TextToImageModel.from_pipeline(pipe)``.
        prompts: a named set, a text, a list of texts, or a file; see :func:`dpok_gym.prompts.load_prompts`. Episodes
            draw from its training prompts.
        reward: a name, ``{name: weight}``, a callable or an address; see :func:`dpok_gym.rewards.make_reward`.
        num_inference_steps: T, denoising steps of an image, usually 10 to 50; more give finer images and cost more.
        eta: amount of noise in each step, in (0, 1]; 1 is that of the diffusion's posterior, less explores less.
        guidance_scale: scale of classifier-free guidance, at least 0; 1 is none and halves the cost, Stable Diffusion
            uses 5 to 7.5.
        negative_prompt: text that guidance leads away from; it needs a guidance scale other than 1.
        image_size: pixels of a side, or height and width; None for the size that the model was trained with.
        device: where the networks run: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ... A loaded model
            stays where it is.
        dtype: precision of the frozen weights: "float32", or "bfloat16" for half of the memory; "float16" can draw but
            not learn.
        model_kwargs: further arguments of :func:`dpok_gym.models.load_model`, such as ``{"revision": "main"}``. A
            loaded model has its own: these, dtype, image size and negative prompt are refused for it.
        max_prompt_bytes: L, length of the observed prompt in bytes of UTF-8; longer prompts are refused.
        non_finite: "error" stops at a reward that is not finite; "mask" marks the image as not valid and goes on.
        decode_batch_size: images decoded at a time, or "auto" for as many as fit into memory. With 1, an image does not
            depend on the others drawn with it, not even in its last bit; more can be faster.
        reward_workers: threads that compute rewards while later images are decoded, at least 0; for rewards that wait
            or compute outside of Python, and may be called by several threads. 0 uses this thread.
        render_mode: "rgb_array" or None.
        unknown: always empty: an unknown keyword argument is an error that names the nearest known one.

    Raises:
        TypeError: if a keyword argument is unknown.
        ValueError: if an argument is out of range; the message says which.
    """

    metadata = {  # noqa: RUF012 (gymnasium's own declaration)
        "render_modes": ["rgb_array"],
        "render_fps": 10,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        model: str | os.PathLike[str] | TextToImageModel = _DEFAULTS["model"],
        prompts: str | Sequence[str] | PromptSet = _DEFAULTS["prompts"],
        reward: Any = _DEFAULTS["reward"],
        num_inference_steps: int = 20,
        eta: float = 1.0,
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        image_size: int | Sequence[int] | None = None,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        model_kwargs: Mapping[str, Any] | None = None,
        max_prompt_bytes: int = 512,
        non_finite: Literal["error", "mask"] = "error",
        decode_batch_size: int | Literal["auto"] = 1,
        reward_workers: int = 0,
        render_mode: str | None = None,
        **unknown: Any,
    ) -> None:
        _check_no_unknown(unknown)
        self.num_envs = check_integer("num_envs", num_envs)
        self.max_prompt_bytes = check_integer("max_prompt_bytes", max_prompt_bytes)
        self.reward_workers = check_integer("reward_workers", reward_workers, minimum=0)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        self.render_mode = render_mode

        own = {"negative_prompt": negative_prompt, "image_size": image_size}
        self.model = find_model(model, device, dtype, own, model_kwargs or {})
        self.process = DenoisingProcess(self.model, "ddim", num_inference_steps, eta, guidance_scale)
        self.prompts = load_prompts(prompts)
        # An error now is better than one in the middle of a long run.
        self.model.check_prompts(self.prompts.train)
        prompt_to_bytes(self.prompts.train, max_prompt_bytes)
        self.reward: Reward = make_reward(reward, non_finite)
        self._judge = ImageJudge(self.model, self.reward, decode_batch_size, self.reward_workers)
        if self.model.device.type != "cpu" and len(self.prompts.train) <= _MAX_PROMPTS_ENCODED_AHEAD:
            self.model.encode(self.prompts.train)
            self.model.offload_text_encoder()  # its memory is better used for images

        self._make_spaces()
        shape = self.model.latent_shape
        self._generators: list[np.random.Generator] = []
        self._seeds: list[int] = []
        self._latents = np.zeros((num_envs, *shape), np.float32)
        self._prompt_bytes = np.zeros((num_envs, max_prompt_bytes), np.uint8)
        self._texts = [""] * num_envs
        self._step: int | None = None  # None: no episode has begun

    def _make_spaces(self) -> None:
        shape = self.model.latent_shape
        self.single_observation_space = spaces.Dict(
            {
                "latent": spaces.Box(-np.inf, np.inf, shape, np.float32),
                "step": spaces.Discrete(self.process.num_inference_steps),
                "prompt": spaces.Box(0, 255, (self.max_prompt_bytes,), np.uint8),
            }
        )
        self.single_action_space = spaces.Box(-LATENT_BOUND, LATENT_BOUND, shape, np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    @property
    def world(self) -> World | None:
        """The embedded world whose judge can read these prompts and images; None if there is none."""
        world = find_world(self.model.name)
        if world is None or not world.can_judge(self.prompts.train, self.model.image_shape):
            return None
        return world

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]  # as SyncVectorEnv has it
        """The generators of the n environments. All random numbers come from them."""
        return tuple(self._generators)

    @property  # type: ignore[misc]
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]  # likewise
        """The seeds of these generators."""
        return tuple(self._seeds)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draws prompts and noise for all environments.

        Args:
            seed: environment i gets ``seed + i``, or the i-th of a sequence; None leaves the generators as they are.
            options: ``{"prompt": text}`` or ``{"prompt": [n texts]}`` in place of prompts from the set;
                ``{"latent": x_T}``, (C, h, w) for all or (n, C, h, w), in place of noise.

        Returns:
            The observation, and the prompts in the infos.

        Raises:
            ValueError: if the number of seeds is not n, an option is unknown or wrong, or the model cannot read a
                prompt.
        """
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = [None if each is None else operator.index(each) for each in seed]
        if len(seeds) != self.num_envs:
            raise ValueError(f"expected a seed for each of the {self.num_envs} environments, got {len(seeds)}")
        self._seed(seeds)
        observation, infos = self.begin_episodes(self._generators, options)
        return observation, self._gather(infos)

    def _seed(self, seeds: Sequence[int | None]) -> None:
        """Makes a new generator where a seed is given, or where there is none yet."""
        is_first = not self._generators
        for i, seed in enumerate(seeds):
            if is_first:
                generator, number = seeding.np_random(seed)
                self._generators.append(generator)
                self._seeds.append(number)
            elif seed is not None:
                self._generators[i], self._seeds[i] = seeding.np_random(seed)

    def step(
        self, actions: NDArray[np.float32]
    ) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Takes one denoising step in all environments, and begins the next episodes after the last step.

        Args:
            actions: (n, C, h, w), the next latents x_{t-1}.

        Raises:
            gymnasium.error.ResetNeeded: before the first :meth:`reset`.
            ValueError: if the actions have another shape or are not finite, or a reward is not finite.
        """
        observation, rewards, terminated, infos = self.advance(actions)
        gathered: dict[str, Any] = {}
        if terminated:
            last = []
            for i, info in enumerate(infos):
                final_obs = {name: values[i] for name, values in observation.items()}
                last.append({"final_obs": final_obs, "final_info": info})
            gathered = self._gather(last)
            # Autoreset in the same step: what is returned is the first observation of the next episodes.
            observation, infos = self.begin_episodes(self._generators)
        ended = np.full(self.num_envs, terminated)
        return observation, rewards, ended, np.zeros_like(ended), self._gather(infos, gathered)

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:  # type: ignore[override]
        """Decodes the current states x_t: n images (H, W, 3), uint8; None without a render mode.

        Raises:
            gymnasium.error.ResetNeeded: before the first :meth:`reset`.
        """
        if self.render_mode is None:
            gymnasium.logger.warn("render() needs render_mode='rgb_array' when the environment is made")
            return None
        if not self._texts[0]:
            raise gymnasium.error.ResetNeeded("call reset() before render()")
        return tuple(to_uint8(self._judge.decode(torch.from_numpy(self._latents))))

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the threads that compute rewards."""
        self._judge.close()

    def begin_episodes(
        self, generators: Sequence[np.random.Generator], options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, list[dict[str, Any]]]:
        """Starts an episode everywhere: a prompt z and x_T ~ N(0, I).

        Args:
            generators: one for each environment, which its prompt and noise are drawn from.
            options: as for :meth:`reset`.

        Returns:
            The observation, and one info for each environment.

        Raises:
            ValueError: if an option is unknown or wrong, or the model cannot read a prompt.
        """
        texts, latents = read_reset_options(options, self._latents.shape)
        if texts is None:
            texts = [self.prompts.sample(rng, 1)[0] for rng in generators]
        # What can fail comes first: an error must leave the old episode as it was.
        self.model.check_prompts(texts)
        self._prompt_bytes = prompt_to_bytes(texts, self.max_prompt_bytes)
        self._texts = texts
        if latents is None:
            shape = self.model.latent_shape
            latents = np.stack([rng.standard_normal(shape, np.float32) for rng in generators])
        self._latents = latents
        self._step = 0
        return self._observe(), [{"prompt": text} for text in texts]

    def advance(
        self, actions: NDArray[np.float32]
    ) -> tuple[Observation, NDArray[np.float64], bool, list[dict[str, Any]]]:
        """Takes one denoising step everywhere, without autoreset; arguments and errors as :meth:`step`.

        Returns:
            The observation, the rewards (n,), True if the episodes ended, and one info for each environment.
        """
        if self._step is None:
            raise gymnasium.error.ResetNeeded("the episode has not begun or is over: call reset() before step()")
        actions = np.array(actions, np.float32)
        if actions.shape != self._latents.shape:
            raise ValueError(
                f"an action is the next latent x_(t-1), of shape {self._latents.shape[1:]}: expected an array of shape "
                f"{self._latents.shape} for {self.num_envs} environment(s), got {actions.shape}"
            )
        if not np.isfinite(actions).all():
            raise ValueError("the action holds NaN or infinity: the policy has diverged, or its input was broken")
        self._latents = actions
        self._step += 1
        if self._step < self.process.num_inference_steps:
            return self._observe(), np.zeros(self.num_envs), False, [{} for _ in self._texts]
        observation = self._observe()
        self._step = None
        # Only now are images decoded: noisy latents have no reward.
        outcome = self.judge(torch.from_numpy(self._latents), self._texts)
        infos = [make_info(outcome, i, text) for i, text in enumerate(self._texts)]
        return observation, outcome.rewards.total.double().numpy(), True, infos

    def judge(self, latents: Tensor, prompts: Sequence[str]) -> Outcome:
        """Decodes finished latents and computes the rewards of the images.

        Args:
            latents: (B, C, h, w) x_0, for any B.
            prompts: the B prompts that the images were made for.

        Raises:
            ValueError: if the number of prompts is not B, or a reward is not finite and ``non_finite`` is "error".
        """
        if len(prompts) != len(latents):
            raise ValueError(f"expected a prompt for each of the {len(latents)} latents, got {len(prompts)}")
        return self._judge(latents, prompts)

    def state_of(self, observation: Observation) -> State:
        """Returns the states that observations of n environments show, on the model's device."""
        texts = prompts_from_bytes(np.asarray(observation["prompt"]))
        device = self.model.device
        latents = torch.as_tensor(observation["latent"], device=device)
        step = torch.as_tensor(observation["step"], device=device)
        return State(latents, step, self.process.encode(texts))

    def _observe(self) -> Observation:
        # The space of "step" ends at T - 1, so the observation after the last step says T - 1 again. No action follows.
        step = min(self._step or 0, self.process.num_inference_steps - 1)
        return {
            "latent": self._latents.copy(),
            "step": np.full(self.num_envs, step, np.int64),
            "prompt": self._prompt_bytes.copy(),
        }

    def _gather(self, infos: list[dict[str, Any]], gathered: dict[str, Any] | None = None) -> dict[str, Any]:
        """Puts the infos of n environments into one, as Gymnasium's vector environments do; or adds them to one."""
        gathered = gathered or {}
        for i, info in enumerate(infos):
            gathered = self._add_info(gathered, info, i)
        return gathered


def _check_no_unknown(unknown: Mapping[str, Any]) -> None:
    known = set(inspect.signature(DenoisingVectorEnv).parameters) - {"unknown"}
    for name in unknown:
        raise TypeError(f"a denoising environment has no argument {name!r}; {suggest(name, known)}")
