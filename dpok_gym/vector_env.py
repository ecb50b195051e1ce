"""Denoising as a batched Markov decision process: the only code that steps it.

Letters used for shapes: n environments, T denoising steps, L tokens of a prompt, C x h x w a latent, H x W a picture.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor, nn

from dpok_gym import diffusion
from dpok_gym.checks import integer
from dpok_gym.images import to_uint8
from dpok_gym.memory import BatchSize
from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.models.base import CACHED_PROMPTS
from dpok_gym.prompts import PromptSet, load_prompts
from dpok_gym.rewards import Reward, judge_chunks, make_reward

Observation = dict[str, NDArray[Any]]

#: Bound of each latent dimension in the action space. Stable-Baselines3 wants one; a latent has a standard deviation
#: of about 1, so it is never reached.
LATENT_BOUND = 100.0


class DenoisingVectorEnv(VectorEnv[Observation, NDArray[np.float32], NDArray[Any]]):
    """``num_envs`` pictures denoised side by side; what the MDP is stands in :class:`dpok_gym.env.DenoisingEnv`.

    All environments start together and last T steps, so they stay in step with one another. Autoreset is
    ``SAME_STEP``: the step that finishes the pictures returns the first observation of the next ones, with the last
    observation in ``infos["final_obs"]`` and pictures and rewards in ``infos["final_info"]``.

    Args:
        num_envs: n, pictures at a time.
        model: a name or path for :func:`dpok_gym.models.load_model`, or a loaded model.
        prompts: what :func:`dpok_gym.prompts.load_prompts` takes; the training prompts are drawn from.
        reward: what :func:`dpok_gym.rewards.make_reward` takes.
        num_inference_steps: T.
        eta: DDIM's share of noise in each step, in (0, 1].
        guidance_scale: of classifier-free guidance, for whoever acts on this environment; 1 is none.
        negative_prompt: what guidance leads away from; None for what the model was trained with.
        image_size: pixels of a side, or (height, width); None for the size that the model was trained with.
        device: of the networks; "auto" for a GPU if there is one. A loaded model stays where it is.
        dtype: of the networks' weights: "float32", "bfloat16" or "float16".
        model_kwargs: further arguments of :func:`dpok_gym.models.load_model`, such as ``{"revision": "main"}``. A
            loaded model has its own: these, the dtype, the picture's size and the negative prompt are refused for it.
        non_finite: "error" or "mask", what becomes of a reward that is not finite.
        decode_batch_size: pictures decoded at a time. With 1, a picture does not depend on which others are drawn with
            it, not even in its last bit; more is faster where single pictures leave the device idle. "auto" takes as
            many as fit into memory.
        reward_workers: threads that judge the finished pictures, in two chunks each, while later ones are decoded;
            for rewards that wait or compute outside of Python, and may be called by several threads. The step still
            returns with all rewards. 0 judges all pictures at once, in this thread.
        render_mode: "rgb_array" or None.

    Raises:
        ValueError: if an argument makes no sense; the message says which.
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
        model: str | os.PathLike[str] | TextToImageModel = "shapes",
        prompts: str | Sequence[str] | PromptSet = "shapes",
        reward: Any = "shapes-alignment",
        num_inference_steps: int = 20,
        eta: float = 1.0,
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        image_size: int | Sequence[int] | None = None,
        device: str = "auto",
        dtype: str = "float32",
        model_kwargs: Mapping[str, Any] | None = None,
        non_finite: Literal["error", "mask"] = "error",
        decode_batch_size: int | Literal["auto"] = 1,
        reward_workers: int = 0,
        render_mode: str | None = None,
    ) -> None:
        num_envs = integer("num_envs", num_envs)
        reward_workers = integer("reward_workers", reward_workers, least=0)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        if not 0 <= guidance_scale < np.inf:
            raise ValueError(f"guidance_scale must be finite and at least 0 (1 is no guidance), got {guidance_scale}")
        options = {"negative_prompt": negative_prompt, "image_size": image_size, **(model_kwargs or {})}
        if isinstance(model, (str, os.PathLike)):
            self.model = load_model(model, device, dtype, **options)
        elif given := [
            name for name, value in {**options, "dtype": dtype}.items() if value not in (None, False, "float32")
        ]:
            raise ValueError(f"a loaded model has its own {', '.join(given)}: give these to load_model() instead")
        else:
            self.model = model
        self.schedule = diffusion.make_schedule(self.model.scheduler_config, num_inference_steps, eta)
        num_inference_steps = len(self.schedule)  # which may have come as one of NumPy's integers
        self.prompts = load_prompts(prompts)
        self.model.tokenize(self.prompts.train[:1000])  # a prompt that cannot be read is better found now than later
        if self.model.device.type != "cpu" and len(self.prompts.train) <= CACHED_PROMPTS:
            self.model.encode(self.model.tokenize(self.prompts.train))
            self.model.park_text_encoder()  # its memory is better used for pictures
        self.reward: Reward = make_reward(reward, non_finite)
        #: What a policy must know to act here, as plain JSON-able values.
        self.sampler: dict[str, Any] = {
            "model": self.model.name,
            "model_kwargs": self.model.options,
            "num_inference_steps": num_inference_steps,
            "eta": eta,
            "guidance_scale": guidance_scale,
        }
        self.num_envs = num_envs
        self.render_mode = render_mode
        self._decoding = BatchSize("decode_batch_size", decode_batch_size)
        self.reward_workers = reward_workers
        self._executor = ThreadPoolExecutor(reward_workers, "reward") if reward_workers else None

        shape = self.model.latent_shape
        self.single_observation_space = spaces.Dict(
            {
                "latent": spaces.Box(-np.inf, np.inf, shape, np.float32),
                "step": spaces.Discrete(num_inference_steps),
                "prompt": spaces.Box(0, self.model.vocab_size - 1, (self.model.max_tokens,), np.int64),
            }
        )
        self.single_action_space = spaces.Box(-LATENT_BOUND, LATENT_BOUND, shape, np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self._generators: list[np.random.Generator] = []
        self._seeds: list[int] = []
        self._latents = np.zeros((num_envs, *shape), np.float32)
        self._tokens = np.zeros((num_envs, self.model.max_tokens), np.int64)
        self._texts = [""] * num_envs
        self._step: int | None = None  # None: an episode has to be begun first

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]  # as SyncVectorEnv has it
        """The environments' generators, all the randomness there is."""
        return tuple(self._generators)

    @property  # type: ignore[misc]
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]  # likewise
        """What the environments' generators were seeded with."""
        return tuple(self._seeds)

    def state_dict(self, generators: Sequence[np.random.Generator] | None = None) -> dict[str, Any]:
        """What going on exactly needs: the generators' states, and the statistics that rewards are normalised by.

        Args:
            generators: one for each environment; None for its own, of which there are none before the first reset.
        """
        states = [generator.bit_generator.state for generator in generators or self._generators]
        return {"np_random": states, "reward": self.reward.state_dict()}

    def load_state_dict(
        self, state: Mapping[str, Any], generators: Sequence[np.random.Generator] | None = None
    ) -> None:
        """Goes on with what :meth:`state_dict` returned; one of more or fewer environments leaves the generators."""
        own = generators or self._generators
        if len(own) == len(state["np_random"]):
            for generator, saved in zip(own, state["np_random"], strict=True):
                generator.bit_generator.state = saved
        self.reward.load_state_dict(state["reward"])

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draws prompts and noise for all environments.

        Args:
            seed: environment i is seeded with ``seed + i``, or with the i-th of a sequence; None goes on.
            options: ``{"prompt": text}`` for all environments, or ``{"prompt": [n texts]}``, not from the prompt set;
                ``{"latent": x_T}``, (C, h, w) for all or (n, C, h, w), not drawn.
        """
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = [None if each is None else operator.index(each) for each in seed]
        if len(seeds) != self.num_envs:
            raise ValueError(f"{self.num_envs} environments need as many seeds, got {len(seeds)}")
        known: list[Any] = list(zip(self._generators, self._seeds, strict=True)) or [None] * self.num_envs
        seeded = [
            old if old and each is None else seeding.np_random(each) for each, old in zip(seeds, known, strict=True)
        ]
        self._generators, self._seeds = map(list, zip(*seeded, strict=True))
        observation, infos = self.begin_episodes(self._generators, options)
        return observation, self._gather(infos)

    def step(
        self, actions: NDArray[np.float32]
    ) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Takes the actions (n, C, h, w), the next latents x_{t-1}, in all environments."""
        observation, rewards, terminated, infos = self.advance(actions)
        gathered: dict[str, Any] = {}
        if terminated:
            last = [{name: values[i] for name, values in observation.items()} for i in range(self.num_envs)]
            gathered = self._gather(
                [{"final_obs": obs, "final_info": info} for obs, info in zip(last, infos, strict=True)]
            )
            observation, infos = self.begin_episodes(self._generators)
        ended = np.full(self.num_envs, terminated)
        return observation, rewards, ended, np.zeros_like(ended), self._gather(infos, gathered)

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:  # type: ignore[override]
        """The current states x_t, decoded: n pictures (H, W, 3), uint8."""
        if self.render_mode is None:
            gymnasium.logger.warn("render() needs render_mode='rgb_array' when the environment is made")
            return None
        if not self._texts[0]:
            raise gymnasium.error.ResetNeeded("call reset() before render()")
        return tuple(to_uint8(self._decode(self._latents)))

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the threads that judge."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def begin_episodes(
        self, generators: Sequence[np.random.Generator], options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, list[dict[str, Any]]]:
        """Starts an episode everywhere: a prompt z and x_T ~ N(0, I) from each environment's own generator."""
        chosen, latents = self._chosen(options)
        texts = chosen or [self.prompts.sample(rng, 1)[0] for rng in generators]
        # First what may be refused: an episode that goes on is not to be judged by a prompt that was never begun.
        self._tokens = self.model.tokenize(texts).numpy()
        self._texts = texts
        if latents is None:
            shape = self.model.latent_shape
            latents = np.stack([rng.standard_normal(shape, np.float32) for rng in generators])
        self._latents = latents
        self._step = 0
        return self._observe(), [{"prompt": text} for text in self._texts]

    def advance(
        self, actions: NDArray[np.float32]
    ) -> tuple[Observation, NDArray[np.float64], bool, list[dict[str, Any]]]:
        """One denoising step everywhere, without autoreset.

        Returns:
            The observation, the rewards (n,), whether the episodes ended, and one info for each environment.
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
        if self._step < len(self.schedule):
            return self._observe(), np.zeros(self.num_envs), False, [{} for _ in self._texts]
        observation = self._observe()
        self._step = None
        rewards, infos = self._judge()
        return observation, rewards, True, infos

    def pretrained_transition(
        self, observation: Observation, denoiser: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """The pre-trained model's p(x_{t-1} | x_t, z): its mean (n, C, h, w) and std (n,), float32 on the CPU.

        With a ``denoiser``, that of the model with this in place of its own.
        """
        with torch.no_grad():
            latents = torch.as_tensor(observation["latent"])
            step = torch.as_tensor(observation["step"])
            conditioning = self.model.encode(torch.as_tensor(observation["prompt"]))
            device = self.model.device
            timesteps = self.schedule.timesteps[step].to(device)
            output = self.model.predict(
                latents.to(device), timesteps, conditioning, self.sampler["guidance_scale"], denoiser
            )
            return self.schedule.mean(step, latents, output.cpu()), self.schedule.std[step]

    def _chosen(self, options: Mapping[str, Any] | None) -> tuple[list[str] | None, NDArray[np.float32] | None]:
        """The prompts and the x_T that the reset options ask for."""
        options = dict(options or {})
        texts, latents = options.pop("prompt", None), options.pop("latent", None)
        if options:
            raise ValueError(f"unknown reset options {sorted(options)}; there are 'prompt' and 'latent'")
        if texts is not None:
            texts = [texts] * self.num_envs if isinstance(texts, str) else list(texts)
            if len(texts) != self.num_envs:
                raise ValueError(f"the option 'prompt' takes one text or {self.num_envs}, got {len(texts)}")
            texts = list(load_prompts(texts).train)  # which says so if one is blank or no text
        if latents is not None:
            try:
                latents = np.array(latents, np.float32)
            except (TypeError, ValueError) as error:
                raise ValueError(f"the option 'latent' takes an array of numbers: {error}") from error
            if latents.shape not in (self._latents.shape, self._latents.shape[1:]) or not np.isfinite(latents).all():
                raise ValueError(
                    f"the option 'latent' takes finite numbers of shape {self._latents.shape[1:]}, or "
                    f"{self._latents.shape} for all environments, got {latents.shape}"
                )
            latents = np.broadcast_to(latents, self._latents.shape).copy()
        return texts, latents

    def _observe(self) -> Observation:
        # The observation after the last step says T - 1 again: the space ends there, and nobody acts on it.
        step = min(self._step or 0, len(self.schedule) - 1)
        return {
            "latent": self._latents.copy(),
            "step": np.full(self.num_envs, step, np.int64),
            "prompt": self._tokens.copy(),
        }

    def _decode(self, latents: NDArray[np.float32]) -> Tensor:
        return self._decoding.map(lambda rows: self.model.decode(torch.from_numpy(latents[rows])), len(latents))

    def _finished(self) -> Iterator[tuple[Tensor, list[str]]]:
        """The finished pictures and their prompts, decoded chunk by chunk."""
        size = self.num_envs
        if self.reward_workers:
            size = math.ceil(self.num_envs / (2 * self.reward_workers))
            decoded = self._decoding.size or 1
            size = math.ceil(size / decoded) * decoded  # the same decoding as without
        for first in range(0, self.num_envs, size):
            rows = slice(first, first + size)
            yield self._decode(self._latents[rows]), self._texts[rows]

    def _judge(self) -> tuple[NDArray[np.float64], list[dict[str, Any]]]:
        """Decodes and rewards the finished pictures."""
        pictures, judged = judge_chunks(self.reward, self._finished(), self._executor)
        frames, valid = to_uint8(pictures), judged.valid.numpy()
        infos: list[dict[str, Any]] = [
            {
                "prompt": text,
                "image": frames[i].copy(),
                "rewards": {name: float(values[i]) for name, values in judged.components.items()},
                "reward_valid": bool(valid[i]),
            }
            for i, text in enumerate(self._texts)
        ]
        return judged.total.double().numpy(), infos

    def _gather(self, infos: list[dict[str, Any]], gathered: dict[str, Any] | None = None) -> dict[str, Any]:
        gathered = gathered or {}
        for i, info in enumerate(infos):
            gathered = self._add_info(gathered, info, i)
        return gathered
