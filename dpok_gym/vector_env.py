"""Denoising as a batched Markov decision process. The only code that steps it.

Letters used for shapes: n environments, B images, T denoising steps, L bytes of a prompt, C x h x w a latent, H x W an
image.
"""

from __future__ import annotations

import copy
import functools
import inspect
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

from dpok_gym import diffusion
from dpok_gym.id_settings import MadeById
from dpok_gym.judging import ImageJudge, Outcome, make_info
from dpok_gym.models import TextToImageModel
from dpok_gym.models.base import MIN_PROMPTS_KEPT
from dpok_gym.models.loading import find_model
from dpok_gym.models.scheduler_configs import TimestepSpacing
from dpok_gym.prompt_checks import check_prompts, skip_long_prompts
from dpok_gym.prompts import PromptSet, load_prompts, prompt_to_bytes, prompts_from_bytes
from dpok_gym.registration import DEFAULT_ENVIRONMENT, ENVIRONMENTS
from dpok_gym.reset_options import read_reset_mask, read_reset_options
from dpok_gym.rewards import Reward, make_reward
from dpok_gym.samplers import DenoisingProcess, State
from dpok_gym.samplers.flow_matching import Kernel
from dpok_gym.samplers.process import check_sampler
from dpok_gym.utils.images import tile, to_uint8
from dpok_gym.utils.pickling import check_picklable
from dpok_gym.utils.validation import (
    check_bool,
    check_choice,
    check_integer,
    check_mapping,
    check_non_negative,
    check_positive,
    shorten,
    suggest,
)
from dpok_gym.utils.window import Window
from dpok_gym.worlds import World, find_world

Observation = dict[str, NDArray[Any]]

#: Bound of each latent dimension in the action space. Stable-Baselines3 asks for one; a latent has a standard deviation
#: of about 1, so no action reaches it.
LATENT_BOUND = 100.0

#: More images at once are drawn by more processes; and ten times as many would fill the memory of a large machine.
MAX_ENVS = 2**17

#: Attributes that the constructor makes anew of its arguments.
_MADE_OF_ARGUMENTS = ("model", "process", "prompts", "reward", "_judge", "_reference", "world")

_DEFAULTS = ENVIRONMENTS[DEFAULT_ENVIRONMENT]


def find_model_of_env(arguments: Mapping[str, Any]) -> TextToImageModel:
    """Loads the model of an environment, or takes it if it is loaded; errors as :func:`dpok_gym.models.load_model`.

    Args:
        arguments: of :class:`DenoisingVectorEnv`, by name.
    """
    own = {name: arguments[name] for name in ("negative_prompt", "image_size", "timestep_spacing")}
    # An environment leaves out long prompts itself.
    own["long_prompts"] = "truncate" if arguments["long_prompts"] == "truncate" else "error"
    further = arguments["model_kwargs"]
    return find_model(
        arguments["model"], arguments["device"], arguments["dtype"], own, {} if further is None else further
    )


class DenoisingVectorEnv(MadeById, VectorEnv[Observation, NDArray[np.float32], NDArray[Any]]):  # type: ignore[misc]
    """``num_envs`` images denoised side by side. :class:`dpok_gym.env.DenoisingEnv` documents the decision process.

    All environments start together and last T steps, so they are at the same step unless ``reset`` takes a mask. With
    the autoreset mode ``SAME_STEP``, the step that finishes the images returns the first observation of the next
    episodes. The last observation is in ``infos["final_obs"]``, images and rewards are in ``infos["final_info"]``.

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
        sampler: how noise is added: "ddim", or "ode" for none, which only algorithms can use that learn from finished
            images. Flow-matching models also know "flow-sde", "dance-sde", "cps" and "precise", see
            :func:`dpok_gym.samplers.make_flow_table`.
        eta: amount of noise in each step, at least 0, and at most 1 for "ddim" and "cps"; 1 for "ddim" is that of the
            diffusion's posterior, less explores less. None for the sampler's usual one, 1 for "ddim".
        sde_steps: the first stochastic step, from 0, and the number of them: the other steps are deterministic, so less
            has to be learned from each image, and less is explored. None for all steps.
        guidance_scale: scale of classifier-free guidance, at least 0; 1 is none and halves the cost, Stable Diffusion
            uses 5 to 7.5.
        negative_prompt: text that guidance leads away from; it needs a guidance scale other than 1.
        image_size: pixels of a side, or height and width; None for the size that the model was trained with.
        long_prompts: what becomes of prompts that are longer than the model reads: "error" refuses them, "truncate"
            draws without their end, as diffusers' pipelines do, and "skip" leaves them out.
        timestep_spacing: "leading", as in the published Stable Diffusion models, or "trailing", which begins at the
            last training timestep, and is the only one that flow-matching models know; None for that of the model's
            scheduler.
        device: where the networks run: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ... A loaded model
            stays where it is.
        dtype: precision of the frozen weights: "float32", or "bfloat16" for half of the memory; "float16" can draw but
            not learn.
        model_kwargs: further arguments of :func:`dpok_gym.models.load_model`, such as ``{"revision": "main"}``. A
            loaded model has its own: these, dtype, image size, negative prompt, "truncate" and timestep spacing are
            refused for it.
        max_prompt_bytes: L, length of the observed prompt in bytes of UTF-8; longer prompts are refused.
        non_finite: "error" stops at a reward that is not finite; "mask" marks the image as not valid and goes on.
        decode_batch_size: images decoded at a time, or "auto" for as many as fit into memory. With 1, an image does not
            depend on the others drawn with it, not even in its last bit; more can be faster.
        reward_workers: threads that compute rewards while later images are decoded, at least 0; for rewards that wait
            or compute outside of Python, and may be called by several threads. 0 uses this thread.
        reference_info: True puts the pre-trained model's Gaussian of each step, and the log-probability of the action
            under it, into the infos. It costs a call of the denoiser for each step.
        reference_log_prob_coef: beta, reward per nat, finite and at least 0: each step's reward gets
            beta * log p_pre(x_{t-1} | x_t, z). Above 0 it costs the same call.
        predicted_info: True puts ``predicted`` into the infos of every reset and step: the image that the pre-trained
            model expects of the observed latent. It costs the same call, and a decoding.
        autoreset_mode: "SameStep", "NextStep" or "Disabled", or the member of ``gymnasium.vector.AutoresetMode``, as
            Gymnasium defines them. Most of Gymnasium's vector wrappers that change observations need one of the last
            two; agents of Stable-Baselines3 need the first.
        render_mode: "rgb_array", see :meth:`render`; "human" to see the frames in a window, which needs the extra
            ``human``; or None.
        unknown: always empty: an unknown keyword argument is an error that names the nearest known one.

    Raises:
        TypeError: if a keyword argument is unknown.
        ValueError: if an argument is out of range; the message says which.
    """

    metadata = {  # noqa: RUF012 (gymnasium's own declaration)
        "render_modes": ["human", "rgb_array"],
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
        sampler: Kernel = "ddim",
        eta: float | None = None,
        sde_steps: Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        image_size: int | Sequence[int] | None = None,
        long_prompts: Literal["error", "truncate", "skip"] = "error",
        timestep_spacing: TimestepSpacing | None = None,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        model_kwargs: Mapping[str, Any] | None = None,
        max_prompt_bytes: int = 512,
        non_finite: Literal["error", "mask"] = "error",
        decode_batch_size: int | Literal["auto"] = 1,
        reward_workers: int = 0,
        reference_info: bool = False,
        reference_log_prob_coef: float = 0.0,
        predicted_info: bool = False,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP.value,
        render_mode: str | None = None,
        **unknown: Any,
    ) -> None:
        self._arguments = {name: value for name, value in locals().items() if name not in ("self", "unknown")}
        _check_no_unknown(unknown)
        self.num_envs = check_integer("num_envs", num_envs, maximum=MAX_ENVS)
        self.max_prompt_bytes = check_integer("max_prompt_bytes", max_prompt_bytes, maximum=2**16)
        self.reward_workers = check_integer("reward_workers", reward_workers, minimum=0, maximum=256)
        check_bool("reference_info", reference_info)
        check_bool("predicted_info", predicted_info)
        if not isinstance(render_mode, str | None) or render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(
                f"render_mode must be None, 'human' or 'rgb_array' (and of gymnasium.make() 'rgb_array_list'), got "
                f"{shorten(render_mode)}"
            )
        self.render_mode = render_mode
        self._window = Window(self.metadata["render_fps"]) if render_mode == "human" else None
        self.autoreset_mode = _read_autoreset_mode(autoreset_mode)
        self.metadata = type(self).metadata | {"autoreset_mode": self.autoreset_mode}
        check_non_negative("reference_log_prob_coef", reference_log_prob_coef)
        self.reference_info, self.reference_log_prob_coef = reference_info, reference_log_prob_coef
        self.predicted_info = predicted_info

        check_choice("long_prompts", long_prompts, "error", "truncate", "skip")
        # What can be told without the model: loading it may take minutes.
        check_sampler(sampler, num_inference_steps, eta, guidance_scale, sde_steps)
        self.model = find_model_of_env(self._arguments)
        self.process = DenoisingProcess(self.model, sampler, num_inference_steps, eta, guidance_scale, sde_steps)
        self.prompts = load_prompts(prompts)
        if long_prompts == "skip":
            self.prompts = skip_long_prompts(self.prompts, self.model, self.max_prompt_bytes)
        check_prompts(self.prompts, self.model, self.max_prompt_bytes)
        self.reward: Reward = make_reward(reward, non_finite)
        self._judge = ImageJudge(self.model, self.reward, decode_batch_size, self.reward_workers)
        if self.model.device.type != "cpu":
            if len(self.prompts.train) <= MIN_PROMPTS_KEPT:  # a longer list is encoded as its prompts are drawn
                for prompt in self.prompts.train:  # one at a time: all of them at once may not fit beside the encoders
                    self.model.encode([prompt])
            self.model.offload_text_encoder()  # its memory is better used for images

        self._make_spaces()
        shape = self.model.latent_shape
        self._generators: list[np.random.Generator] = []
        self._seeds: list[int] = []
        self._latents = np.zeros((num_envs, *shape), np.float32)
        self._prompt_bytes = np.zeros((num_envs, max_prompt_bytes), np.uint8)
        self._texts = [""] * num_envs
        self._steps = np.full(num_envs, -1)  # denoising steps done: -1 before the first episode, T after an episode
        self._reference: tuple[Tensor, Tensor] | None = None  # the pre-trained transition, once it is known

    def __getstate__(self) -> dict[str, Any]:
        """Returns the arguments that make this environment again, and its episodes with their random state.

        Raises:
            TypeError: if an argument cannot be pickled, or holds weights.
        """
        # The prompts themselves: a file may be somewhere else where this is read.
        arguments = self._arguments | {"prompts": self.prompts}
        advice = "give the model by its name, folder or file, and a reward by its name or as 'module:function'"
        check_picklable("an environment is pickled as its arguments", arguments, advice)
        own = {name: value for name, value in vars(self).items() if name not in _MADE_OF_ARGUMENTS}
        return own | {"_arguments": arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        DenoisingVectorEnv.__init__(self, **state["_arguments"])
        vars(self).update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> DenoisingVectorEnv:
        """Returns an environment with the same model and reward, not copies of them, and episodes of its own."""
        twin = memo[id(self)] = object.__new__(type(self))
        # Wherever else they are, such as in a spec: whatever is in the memo is not copied.
        for shared in (self.model, self.reward, self.prompts, self._reference, self.world, *self._arguments.values()):
            memo[id(shared)] = shared
        own = {name: value for name, value in vars(self).items() if name not in ("process", "_judge")}
        vars(twin).update(copy.deepcopy(own, memo))
        twin.process = copy.copy(self.process)
        twin._judge = ImageJudge(self.model, self.reward, self._arguments["decode_batch_size"], self.reward_workers)
        return twin

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

    @functools.cached_property
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
                ``{"latent": x_T}``, (C, h, w) for all or (n, C, h, w), in place of noise; ``{"reset_mask": mask}``,
                (n,) bool, to reset only where it is true.

        Returns:
            The observation, and the prompts in the infos.

        Raises:
            ValueError: if the number of seeds is not n, an option is unknown or wrong, or the model cannot read a
                prompt.
        """
        seeds: list[int | None] = [None] * self.num_envs
        if isinstance(seed, Sequence):
            seeds = [None if each is None else check_integer("a seed", each, 0, 2**64) for each in seed]
        elif seed is not None:
            seeds = [check_integer("the seed", seed, 0, 2**64) + i for i in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise ValueError(f"expected a seed for each of the {self.num_envs} environments, got {len(seeds)}")
        options = {} if options is None else dict(check_mapping("options", options))
        where = read_reset_mask(options.pop("reset_mask", None), self.num_envs)
        self._seed([each if begins else None for each, begins in zip(seeds, where, strict=True)])
        observation, infos = self.begin_episodes(self._generators, options, where)
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
        """Takes one denoising step in all environments, and begins new episodes as the autoreset mode says.

        Args:
            actions: (n, C, h, w), the next latents x_{t-1}.

        Raises:
            gymnasium.error.ResetNeeded: before the first :meth:`reset`; and after an episode's end, if autoreset is
                disabled.
            ValueError: if the actions have another shape or are not finite, or a reward is not finite.
        """
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            over = self._steps == self.process.num_inference_steps
            observation, rewards, ended, infos = self.advance(actions, ~over)
            if over.any():  # the action is not used there: the step is the reset
                observation, begun = self.begin_episodes(self._generators, where=over)
                infos = [first or info for first, info in zip(begun, infos, strict=True)]
            return observation, rewards, ended, np.zeros_like(ended), self._gather(infos)
        observation, rewards, ended, infos = self.advance(actions)
        gathered: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and ended.any():
            last: list[dict[str, Any]] = [{} for _ in infos]
            for i in np.flatnonzero(ended):
                final_obs = {name: values[i] for name, values in observation.items()}
                last[i] = {"final_obs": final_obs, "final_info": infos[i]}
            gathered = self._gather(last)
            # What is returned is the first observation of the next episodes.
            observation, begun = self.begin_episodes(self._generators, where=ended)
            infos = [first or info for first, info in zip(begun, infos, strict=True)]
        return observation, rewards, ended, np.zeros_like(ended), self._gather(infos, gathered)

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:  # type: ignore[override]
        """Draws each state: on the left x_t, decoded; on the right the image that the pre-trained model expects of it.

        Returns:
            n frames (H, 2 W, 3), uint8; at the end of an episode both halves are its image. None without a render mode,
            and with "human", where the frames are shown in a window: after each reset and step without this call.

        Raises:
            gymnasium.error.ResetNeeded: before the first :meth:`reset`.
        """
        if self.render_mode is None:
            gymnasium.logger.warn("render() needs render_mode='rgb_array' or 'human' when the environment is made")
            return None
        if (self._steps < 0).any():
            raise gymnasium.error.ResetNeeded("call reset() before render()")
        states = to_uint8(self._judge.decode(torch.from_numpy(self._latents)))
        frames = np.concatenate([states, self._predict(np.arange(self.num_envs))], axis=2)
        if self._window is None:
            return tuple(frames)
        self._window.show(tile(frames), f"x_t and the x_0 expected, after {self._steps.max()} steps: {self._texts[0]}")
        return None

    def _show(self) -> None:
        """Shows the states in the window, if there is one and all environments have begun."""
        if self._window is not None and (self._steps >= 0).all():
            self.render()

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the window, and ends the threads that compute rewards."""
        if self._window is not None:
            self._window.close()
        self._judge.close()

    def begin_episodes(
        self,
        generators: Sequence[np.random.Generator],
        options: Mapping[str, Any] | None = None,
        where: NDArray[np.bool_] | None = None,
    ) -> tuple[Observation, list[dict[str, Any]]]:
        """Starts episodes: a prompt z and x_T ~ N(0, I).

        Args:
            generators: one for each environment, which its prompt and noise are drawn from.
            options: prompt and latent, as for :meth:`reset`.
            where: (n,) the environments in which an episode starts; None for all.

        Returns:
            The observation, and one info for each environment, empty where no episode starts.

        Raises:
            ValueError: if an option is unknown or wrong, or the model cannot read a prompt.
        """
        rows = list(range(self.num_envs)) if where is None else np.flatnonzero(where).tolist()
        chosen_texts, chosen_latents = read_reset_options(options, self._latents.shape)
        if chosen_texts is None:
            texts = [self.prompts.sample(generators[i], 1)[0] for i in rows]
        else:
            texts = [chosen_texts[i] for i in rows]
        # What can fail comes first: an error must leave the old episodes as they were.
        self.model.check_prompts(texts)
        self._prompt_bytes[rows] = prompt_to_bytes(texts, self.max_prompt_bytes)
        shape = self.model.latent_shape
        infos: list[dict[str, Any]] = [{} for _ in self._texts]
        for i, text in zip(rows, texts, strict=True):
            self._texts[i], infos[i] = text, {"prompt": text}
            if chosen_latents is None:
                self._latents[i] = generators[i].standard_normal(shape, np.float32)
            else:
                self._latents[i] = chosen_latents[i]
        self._steps[rows] = 0
        self._reference = None
        self._add_predicted(infos, rows)
        self._show()
        return self._observe(), infos

    def advance(
        self, actions: NDArray[np.float32], where: NDArray[np.bool_] | None = None
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], list[dict[str, Any]]]:
        """Takes one denoising step, without autoreset; errors as :meth:`step`.

        Args:
            actions: (n, C, h, w), the next latents x_{t-1}.
            where: (n,) the environments that take the step; None for all.

        Returns:
            The observation, the rewards (n,), the ends of episodes (n,), and one info for each environment.
        """
        is_stepping = np.ones(self.num_envs, bool) if where is None else where
        n_steps = self.process.num_inference_steps
        if not self.running[is_stepping].all():
            raise gymnasium.error.ResetNeeded("the episode has not begun or is over: call reset() before step()")
        try:
            actions = np.array(actions, np.float32)
        except (TypeError, ValueError) as error:
            raise TypeError(f"an action must be an array of numbers: {error}") from None
        if actions.shape != self._latents.shape:
            raise ValueError(
                f"an action is the next latent x_(t-1), of shape {self._latents.shape[1:]}: expected an array of shape "
                f"{self._latents.shape} for {self.num_envs} environment(s), got {actions.shape}"
            )
        if not np.isfinite(actions[is_stepping]).all():
            raise ValueError("the action holds NaN or infinity: the policy has diverged, or its input was broken")
        rewards, infos = self._compare_with_reference(actions, is_stepping)
        self._latents[is_stepping] = actions[is_stepping]
        self._steps += is_stepping
        self._reference = None
        ended = is_stepping & (self._steps == n_steps)
        rows = np.flatnonzero(ended).tolist()
        if rows:  # only now are images decoded: noisy latents have no reward
            texts = [self._texts[i] for i in rows]
            outcome = self.judge(torch.from_numpy(self._latents[rows]), texts)
            rewards[rows] += outcome.rewards.total.double().numpy()
            for k, (i, text) in enumerate(zip(rows, texts, strict=True)):
                infos[i] |= make_info(outcome, k, text)
        self._add_predicted(infos, np.flatnonzero(is_stepping))
        self._show()
        return self._observe(), rewards, ended, infos

    @torch.no_grad()
    def _compare_with_reference(
        self, actions: NDArray[np.float32], is_stepping: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], list[dict[str, Any]]]:
        """Returns beta log p_pre of actions (n, C, h, w) as rewards (n,), and the infos of the pre-trained model."""
        rewards, infos = np.zeros(self.num_envs), [{} for _ in self._texts]  # type: ignore[var-annotated]
        if not is_stepping.any() or not (self.reference_info or self.reference_log_prob_coef):
            return rewards, infos
        mean, std = self.reference_transition()
        # A density over many dimensions is a large number, so float32 would lose its last digits.
        action = torch.as_tensor(actions, device=mean.device).double()
        log_prob = diffusion.log_prob(action, mean.double(), std.double()).cpu().numpy()
        # Added to 0, so that a reward is never -0.0.
        rewards[is_stepping] += self.reference_log_prob_coef * log_prob[is_stepping]
        if self.reference_info:
            means, stds = mean.cpu().numpy(), std.cpu().numpy()
            for i in np.flatnonzero(is_stepping).tolist():
                infos[i] = {
                    "reference_mean": means[i].copy(),
                    "reference_std": float(stds[i]),
                    "log_prob_reference": float(log_prob[i]),
                }
        return rewards, infos

    def _add_predicted(self, infos: list[dict[str, Any]], rows: Sequence[int] | NDArray[np.int64]) -> None:
        """Adds to the infos of some environments, if asked for, the images that are expected of their latents."""
        if self.predicted_info and len(rows):
            for i, image in zip(rows, self._predict(np.asarray(rows)), strict=True):
                infos[i]["predicted"] = image

    @torch.no_grad()
    def _predict(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Returns the images of the x_0 that the pre-trained model predicts in some environments, (B, H, W, 3).

        Where the episode is over, x_0 is there, and nothing is predicted.
        """
        clean = torch.from_numpy(self._latents[rows])
        going_on = rows[self.running[rows]]
        if len(going_on) == self.num_envs:  # then the transition is kept, for the info of the next step
            clean = self.process.predicted_clean(self._state(going_on), self.reference_transition()[0])
        elif len(going_on):
            state = self._state(going_on)
            predicted = self.process.predicted_clean(state, self.process.transition(state)[0])
            clean[self.running[rows]] = predicted.to(clean.device)
        return to_uint8(self._judge.decode(clean))

    def _state(self, rows: NDArray[np.int64]) -> State:
        """Returns the states of some environments, on the model's device."""
        device = self.model.device
        latents = torch.as_tensor(self._latents[rows], device=device)
        step = torch.as_tensor(self._shown_steps()[rows], device=device)
        return State(latents, step, self.process.encode([self._texts[i] for i in rows]))

    @property
    def running(self) -> NDArray[np.bool_]:
        """(n,) whether an episode has begun and is not over."""
        return (self._steps >= 0) & (self._steps < self.process.num_inference_steps)

    @torch.no_grad()
    def reference_transition(self) -> tuple[Tensor, Tensor]:
        """Returns the pre-trained model's Gaussian of the next latents: the mean (n, C, h, w) and the std (n,).

        It is computed once for each step. Where an episode is over, it means nothing.

        Raises:
            gymnasium.error.ResetNeeded: before the first :meth:`reset`.
        """
        if (self._steps < 0).any():
            raise gymnasium.error.ResetNeeded("the episode has not begun: call reset() before step()")
        if self._reference is None:
            self._reference = self.process.transition(self._state(np.arange(self.num_envs)))
        return self._reference

    def optimal_value(self, beta: float) -> float:
        """Returns the largest E[r(x_0, z)] - beta KL that a policy can reach in this environment, Eq. 8 of DPOK.

        The policy chooses the mean of each step's Gaussian. Its standard deviations, x_T and the prompts z are the
        environment's. The KL is that of the denoising steps to the pre-trained model, in nats, and the reward is
        ``reward``; ``reference_log_prob_coef`` does not count.

        Args:
            beta: weight of the KL, reward per nat, above 0.

        Raises:
            ValueError: if nobody knows the answer: the environment belongs to no world, or to one whose answer is not
                known; or if beta is out of range.
        """
        check_positive("beta", beta)
        world = self.world
        if world is None or world.optimum is None:
            raise ValueError(
                f"the optimum is not known for the model {self.model.name!r}; it is where the denoiser is exact, as "
                "in the world of a mixture of Gaussians"
            )
        return world.optimum.value(self.process, self.prompts, self.rewards_of, beta)

    def rewards_of(self, latents: Tensor, prompt: str) -> NDArray[np.float64]:
        """Returns the rewards (B,) of finished latents (B, C, h, w), all for one prompt."""
        return self.judge(latents, [prompt] * len(latents)).rewards.total.double().numpy()

    def judge(self, latents: Tensor, prompts: Sequence[str]) -> Outcome:
        """Decodes finished latents and computes the rewards of the images.

        Args:
            latents: (B, C, h, w) x_0, for any B of at least 1.
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

    def _shown_steps(self) -> NDArray[np.int64]:
        # The space of "step" ends at T - 1, so the observation after the last step says T - 1 again. No action follows.
        return self._steps.clip(0, self.process.num_inference_steps - 1)

    def _observe(self) -> Observation:
        return {
            "latent": self._latents.copy(),
            "step": self._shown_steps(),
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
        # Python's own words: TorchRL's GymEnv tries an argument, and looks for them to know that there is none.
        raise TypeError(f"a denoising environment got an unexpected keyword argument {name!r}; {suggest(name, known)}")


def _read_autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    known = [each.value for each in AutoresetMode]
    return mode if isinstance(mode, AutoresetMode) else AutoresetMode(check_choice("autoreset_mode", mode, *known))
