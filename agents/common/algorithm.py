"""The base of all agents: Stable-Baselines3's interface around images drawn, updates taken, and saving.

Letters used for shapes: B elements of a batch, N images of an iteration, T denoising steps.
"""

from __future__ import annotations

import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar, Literal, Self, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file, save_to_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv

import dpok_gym  # noqa: F401  (registers the environments)
from agents.common import distributed
from agents.common.agent_state import check_algorithm, get_state, set_state
from agents.common.arguments import check_arguments, show_inherited_arguments
from agents.common.buffer import TrajectoryBuffer
from agents.common.critic import CriticKind
from agents.common.exportable import Exportable
from agents.common.held_out import HeldOutReward
from agents.common.monitor import Monitor, TrainingWarning
from agents.common.normalization import RewardNormalizer
from agents.common.policy import DenoisingPolicy
from agents.common.randomness import Purpose, make_generator
from agents.common.rollouts import draw_rollout
from agents.common.updates import UpdatingAlgorithm
from agents.common.vec_env import GymnasiumVecEnv, find_denoising_env
from dpok_gym.rewards import check_reward
from dpok_gym.samplers import DenoisingProcess, SamplerConfig, Transition
from dpok_gym.utils.batching import BatchSize
from dpok_gym.utils.device import find_device
from dpok_gym.utils.sharding import is_sharded
from dpok_gym.utils.validation import MAX_SEED, check_fraction, check_integer, check_non_negative, check_positive
from dpok_gym.vector_env import DenoisingVectorEnv

#: Images that an algorithm draws side by side, if it makes the environment itself.
DEFAULT_N_ENVS = 64

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="DenoisingAlgorithm")


class DenoisingAlgorithm(UpdatingAlgorithm, Exportable):
    """Draws images with a :class:`~agents.common.policy.DenoisingPolicy` and learns from them, iteration by iteration.

    For an algorithm of your own, subclass :class:`~agents.algorithms.policy_gradient.PolicyGradient`,
    :class:`~agents.algorithms.online_forward_process.OnlineForwardProcess` or
    :class:`~agents.algorithms.forward_process.ForwardProcess`, or this class with a ``train()`` of its own. Write
    ``loss(batch)``, which returns the loss of each element (B,) and what to log.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: an id such as "DPOK-SD15-v0", a denoising environment, a vector of them, or SB3's ``VecEnv`` of one.
        learning_rate: learning rate of the denoiser, at least 0; 0 leaves the denoiser as it is. A LoRA on the embedded
            model learns with 1e-3, on Stable Diffusion with 1e-5 to 3e-4; too large a rate shows as images that fall
            apart. A function of the remaining progress, 1 to 0, is allowed.
        final_lr_fraction: share of the learning rate that is left at the end of ``learn``, in [0, 1], falling linearly;
            1 keeps the rate. A falling rate averages out the noise of the last updates.
        warmup_fraction: share of ``learn`` in which the learning rate rises linearly from 0, in [0, 1); Adam's first
            steps have the full length, whatever the gradient is, and most of it is noise.
        images_per_iteration: images drawn between two updates, by all ranks together, at least 1; None for as many as
            there are environments. More give less noise in the gradient and fewer updates.
        n_envs: images that a rank draws side by side, at least 1; it changes memory and speed only, unless
            ``images_per_iteration`` is None. None for 64 if ``env`` is an id, else for as many as ``env`` has.
        batch_size: elements (transitions or images) of an optimiser step, at least 1; None for all there are. Smaller
            takes more steps in each iteration.
        anchor_coef: weight, beside the algorithm's own loss, of the loss that diffusion models are trained with, on
            images of the pre-trained model (DDRL, Ye et al. 2025); at least 0. It holds the policy near all that the
            pre-trained model draws (a forward KL). 0 is no anchor and costs nothing.
        anchor_images: images of the anchor, drawn once, at least 1; each optimiser step takes as many of them as its
            ``batch_size``, at most all.
        micro_batch_size: elements of a forward and backward pass, at least 1, whose gradients add up to those of the
            batch; smaller takes less memory and changes nothing else. None for the batch, "auto" for as many as fit
            into memory.
        max_grad_norm: largest norm of the denoiser's gradient, above 0; infinity for no limit.
        normalize_rewards: standardise each reward of a sum by its running mean and standard deviation before
            weighting, so that weights compare rewards of different scales. Logs and evaluations stay raw.
        held_out_reward: a reward that is logged and not trained on, of at most 16 images of an iteration, and compared
            with the training reward: a name, ``{name: weight}``, a callable or an address. "auto" is another reward of
            an embedded world, or the CLIP score if its files are there; None for none.
        stats_window_size: images that the logged mean reward goes over, at least 1.
        tensorboard_log: folder for TensorBoard; None for no log.
        policy_kwargs: arguments of :class:`~agents.common.policy.DenoisingPolicy`, such as ``{"lora_rank": 16}``.
        verbose: 0 is silent, 1 logs to the console.
        seed: seed of prompts, noise, batches and initial weights, at least 0; None for a random one.
        device: where the policy runs; it must be the environment's. "auto" for a GPU if there is one.

    Attributes:
        process: the denoising process of the environment.
        images_drawn: images drawn and learned from so far.
        iteration: iterations done so far.
        monitor: what warns of a training that goes wrong, with a :class:`~agents.common.monitor.TrainingWarning`.

    Raises:
        TypeError: if there is no such argument.
        ValueError: if an argument is out of range, or the environment is no denoising environment.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"DenoisingPolicy": DenoisingPolicy}
    policy: DenoisingPolicy
    rollout_buffer: TrajectoryBuffer  # type: ignore[assignment]
    process: DenoisingProcess
    _arguments: dict[str, Any]

    #: Whether rollouts compute the KL of each transition to the reference's.
    records_reference_kl: bool = False
    #: Images in a row that have the same prompt.
    group_size: int = 1
    #: Whether the policy has a critic.
    use_critic: bool = False
    #: Whether the policy keeps a copy of its weights that follows them slowly.
    keep_old: bool = False
    #: States that an element of a batch has: two for a pair.
    states_of_an_element: int = 1
    #: Whether a training draws images. If not, all that it learns from is in a file.
    draws_images: bool = True
    #: Which critic, see :class:`~agents.common.policy.DenoisingPolicy`.
    critic_kind: CriticKind = "network"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        show_inherited_arguments(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Checks the names of the arguments, and notes the values: a saved agent is made anew of them."""
        check_arguments(cls, kwargs)
        agent = super().__new__(cls)
        agent._arguments = dict(zip(list(inspect.signature(cls.__init__).parameters)[1:], args, strict=False)) | kwargs
        return agent

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: GymEnv | VectorEnv | str | None = None,
        *,
        learning_rate: float | Schedule = 1e-3,
        final_lr_fraction: float = 1.0,
        warmup_fraction: float = 0.0,
        images_per_iteration: int | None = None,
        n_envs: int | None = None,
        batch_size: int | None = None,
        micro_batch_size: int | Literal["auto"] | None = 128,
        max_grad_norm: float = 1.0,
        anchor_coef: float = 0.0,
        anchor_images: int = 64,
        normalize_rewards: bool = False,
        held_out_reward: str | Mapping[str, float] | Callable[..., Any] | None = "auto",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if isinstance(env, str):
            # Gymnasium's own vectorisation would run a model for each environment.
            n_envs = DEFAULT_N_ENVS if n_envs is None else check_integer("n_envs", n_envs)
            try:
                placed: dict[str, Any] = {} if str(device) == "auto" else {"device": str(device)}
                env = gymnasium.make_vec(env, num_envs=n_envs, vectorization_mode="vector_entry_point", **placed)
            except gymnasium.error.Error as error:
                raise ValueError(f"there is no environment {env!r}: {error}") from error
        elif env is not None and n_envs is not None:
            there = find_denoising_env(env).num_envs
            if check_integer("n_envs", n_envs) != there:
                raise ValueError(
                    f"n_envs={n_envs} does not fit the environment, which has {there}: leave it out, or make the "
                    "environment with as many"
                )
        is_policy = isinstance(policy, type) and issubclass(policy, DenoisingPolicy)
        if not (is_policy or (isinstance(policy, str) and policy in self.policy_aliases)):
            raise TypeError(f"the policy must be {' or '.join(self.policy_aliases)} or a class of it, got {policy!r}")
        if str(device) != "auto":  # SB3 would take the CPU without a word where there is no such GPU
            device = find_device(str(device))
            if env is not None and device != find_denoising_env(env).process.model.device:
                raise ValueError(f"the environment's model is not on {device}: make it with device={str(device)!r}")
        if not callable(learning_rate):
            check_non_negative("learning_rate (or a function of the remaining progress)", learning_rate)
        self.final_lr_fraction = check_fraction("final_lr_fraction", final_lr_fraction)
        self.warmup_fraction = check_fraction("warmup_fraction", warmup_fraction, one=False)
        self.batch_size = None if batch_size is None else check_integer("batch_size", batch_size)
        self.micro_batch_size = micro_batch_size
        self.anchor_coef = check_non_negative("anchor_coef", anchor_coef)
        self.anchor_images = check_integer("anchor_images", anchor_images)
        self.images_per_iteration: int | None = None
        if images_per_iteration is not None:
            self.images_per_iteration = check_integer("images_per_iteration", images_per_iteration)
        self.reward_normalizer = RewardNormalizer() if normalize_rewards else None
        if held_out_reward is not None and not (isinstance(held_out_reward, str) and held_out_reward == "auto"):
            try:
                check_reward(held_out_reward)  # its networks are loaded when they are needed
            except (TypeError, ValueError) as error:
                raise type(error)(f"held_out_reward: {error}") from error
        self.held_out_reward = held_out_reward
        self.monitor = Monitor()
        self.images_drawn = 0
        self.iteration = 0
        self.latest_metrics = {}
        #: The environment's sampler, kept so that a saved agent can be loaded without an environment.
        self.sampler_config: SamplerConfig | None = None
        new_seed = np.random.SeedSequence().generate_state(1)[0]  # from the operating system
        self.run_seed = check_integer("seed", new_seed if seed is None else seed, minimum=0, maximum=MAX_SEED)
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=1,  # set below, once T is known
            # SB3 asks for these; the losses are the subclasses', which have discounts of their own if any.
            gamma=1.0,
            gae_lambda=1.0,
            ent_coef=0.0,
            vf_coef=0.0,
            max_grad_norm=check_positive("max_grad_norm", max_grad_norm),
            use_sde=False,
            sde_sample_freq=-1,
            stats_window_size=check_integer("stats_window_size", stats_window_size),
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=check_integer("verbose", verbose, minimum=0, maximum=2),
            seed=None if seed is None else self.run_seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    @staticmethod
    def _wrap_env(env: GymEnv | VectorEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        return GymnasiumVecEnv(find_denoising_env(env))

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self.lr_schedule = partial(_shaped, self.lr_schedule, self.warmup_fraction, self.final_lr_fraction)

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self._micro_batches = BatchSize("micro_batch_size", self.micro_batch_size)
        self._anchor = None
        self._held_out: HeldOutReward | None = None
        self.set_random_seed(self.seed)
        if self.env is not None:
            self._take_process(self.denoising_env)
        elif self.sampler_config is not None:
            self.process = DenoisingProcess.from_config(self.sampler_config, str(self.device))
        else:
            raise ValueError("an agent needs an environment: pass env='DPOK-SD15-v0', for example")
        if is_sharded(self.process.model.denoiser) and self.micro_batch_size == "auto":
            raise ValueError(
                "the ranks call a denoiser that is spread over them together, so none can choose its own "
                "micro_batch_size: give a number"
            )
        self.n_steps = self.process.num_inference_steps
        if self.images_per_iteration is None:
            self.images_per_iteration = self.n_envs
        self.check_setup()
        # Before the policy is made, which would fail with an error that does not name the nearest argument.
        check_arguments(self.policy_class, self.policy_kwargs)
        with torch.random.fork_rng():  # new weights depend on the seed alone, and change no one else's numbers
            torch.manual_seed(int(make_generator(self.run_seed, Purpose.WEIGHTS).integers(2**62)))
            self.policy = self.policy_class(  # type: ignore[assignment]
                self.observation_space,
                self.action_space,
                self.lr_schedule,
                process=self.process,
                **{
                    "use_critic": self.use_critic,
                    "critic_kind": self.critic_kind,
                    "keep_old": self.keep_old,
                    "micro_batch_size": self.states_of_a_pass,
                    **self.policy_kwargs,
                },
            )
        model = self.process.model
        self.rollout_buffer = TrajectoryBuffer(
            self.images_per_iteration,
            self.process.num_inference_steps,
            model.latent_shape,
            model.device,
            self.group_size,
        )

    @property
    def denoising_env(self) -> DenoisingVectorEnv:
        """The environment that the agent draws its images with.

        Raises:
            ValueError: if the agent has none.
        """
        if self.env is None:
            raise ValueError("the agent has no environment: give it one with set_env()")
        return find_denoising_env(self.env)

    @property
    def states_of_a_pass(self) -> int:
        """The most states that a gradient goes through at a time; those of an element if memory decides on that."""
        if self.micro_batch_size == "auto":
            return self.states_of_an_element
        assert self.images_per_iteration is not None
        sizes = [size for size in (self.micro_batch_size, self.batch_size) if size is not None]
        return self.states_of_an_element * min(sizes, default=self.images_per_iteration * self.n_steps)

    @property
    def held_out(self) -> HeldOutReward:
        """The held-out reward; its networks are loaded when it is first asked for, before a training draws images.

        Raises:
            ValueError: if there is no such reward; further errors as :func:`dpok_gym.rewards.make_reward`.
        """
        # Agents that only draw or evaluate need none.
        if self._held_out is None:
            self._held_out = HeldOutReward(self.held_out_reward, self.denoising_env)
        return self._held_out

    def _take_process(self, env: DenoisingVectorEnv) -> None:
        """Takes the environment's denoising process, which must sample as the one that was learned with."""
        # An agent that was loaded has learned one sampler; with another, its ratios and KLs would mean nothing.
        if self.sampler_config is not None:
            self.sampler_config.check_equal(env.process.config)
        self.process, self.sampler_config = env.process, env.process.config

    def check_setup(self) -> None:
        """Checks that the algorithm can learn from the denoising process with its arguments; before there is a policy.

        Raises:
            ValueError: if it cannot.
        """
        if self.process.model.options.get("dtype") == "float16":
            raise ValueError(
                "float16 can draw but not learn: the gradient of an element of an output is below its smallest number; "
                "use dtype='bfloat16'"
            )

    def check_whole_groups(self) -> None:
        """Checks that an iteration has whole groups, for algorithms that compare the images of a group.

        Raises:
            ValueError: if it has not.
        """
        n_images = self.images_per_iteration or self.n_envs
        # Half a group would go on in the next iteration, with images of another policy.
        if n_images % self.group_size:
            raise ValueError(
                f"the {n_images} images of an iteration cannot be split into groups of {self.group_size}; choose a "
                "group_size that divides images_per_iteration (or n_envs, if that is None)"
            )

    def set_env(self, env: GymEnv | VectorEnv, force_reset: bool = True) -> None:
        """Puts the agent on another environment, which must sample as the one it was made for."""
        wrapped = self._wrap_env(env, self.verbose)
        assert self.sampler_config is not None
        self.sampler_config.check_equal(find_denoising_env(wrapped).process.config)
        self.n_envs = wrapped.num_envs  # SB3 would refuse another number, which changes memory and speed only
        super().set_env(wrapped, force_reset)
        self._held_out = None  # it suits the reward that is trained on

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Draws images and updates the model, in turn, until enough denoising steps are taken.

        Args:
            total_timesteps: denoising steps, T for each image; rounded up to whole iterations.
            callback: SB3's callbacks, asked after each denoising step and around each rollout.
            log_interval: iterations between two rows of the log.
            tb_log_name: name of the run for TensorBoard; None for the algorithm's.
            reset_num_timesteps: whether to count from 0 again. The images go on in any case: none is drawn twice.
            progress_bar: whether to show SB3's progress bar.
        """
        name = tb_log_name or type(self).__name__
        steps = int(check_non_negative("total_timesteps", total_timesteps))
        total, callback = self._setup_learn(steps, callback, reset_num_timesteps, name, progress_bar)
        callback.on_training_start(locals(), globals())
        while not self.is_done(total):
            with self._whole_iteration():
                if not self.collect_rollouts(self.env, callback, self.rollout_buffer, self.n_steps):
                    break
                self._update_current_progress_remaining(self.num_timesteps, total)
                with self._logged_update(len(self.rollout_buffer)):
                    self.train()
                self._finish_iteration(log_interval)
        callback.on_training_end()
        return self

    def prepare(self) -> str:
        """Loads what a training needs beside its environment; if something is missing, no image was drawn in vain.

        Returns:
            One line that says what it is.
        """
        return self.held_out.description

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        # The prompts follow the numbers of the images, which go on; a loaded agent may have another group_size.
        if self.images_drawn % self.group_size:
            raise ValueError(
                f"the {self.images_drawn} images drawn so far are no whole groups of {self.group_size}: take a "
                "group_size that divides them, such as that of the training before"
            )
        seeds = distributed.gather(torch.tensor([self.run_seed]), distributed.count()).tolist()
        if len(set(seeds)) > 1:  # one of its own for each, without an argument
            raise ValueError(
                f"the ranks have different seeds ({', '.join(map(str, seeds))}), so each would train another model: "
                "give all of them the same seed"
            )
        self.prepare()
        return super()._setup_learn(*args, **kwargs)

    def _fit_iteration(self, callback: BaseCallback, log_interval: int, n_images: int) -> None:
        """Takes the optimiser steps of an iteration that draws no image.

        Args:
            callback: asked as around a rollout.
            log_interval: iterations between two rows of the log.
            n_images: images that the steps learn from, for the speed in the log.
        """
        callback.on_rollout_start()  # where callbacks save
        with self._logged_update(n_images):
            self.train()
        self.iteration += 1
        callback.on_rollout_end()
        if log_interval and self.iteration % log_interval == 0:
            self.dump_logs(self.iteration)

    @contextmanager
    def _whole_iteration(self) -> Iterator[None]:
        """Around an iteration: if it does not come to its end, it counts no images, no steps and no rewards.

        They are drawn again when the agent goes on.
        """
        assert self.ep_info_buffer is not None  # learn() has made it
        before, statistics = (self.num_timesteps, self.ep_info_buffer.copy()), deepcopy(self.algorithm_state())
        iteration = self.iteration
        try:
            yield
        finally:
            if self.iteration == iteration:
                self.num_timesteps, self.ep_info_buffer = before
                self.load_algorithm_state(statistics)

    def _finish_iteration(self, log_interval: int) -> None:
        self.iteration += 1
        self.images_drawn += len(self.rollout_buffer)
        for text in self.monitor.add(self.iteration, self.logger.name_to_value, self.held_out.unwanted):
            if distributed.is_main():
                warnings.warn(text, TrainingWarning, stacklevel=3)
        if log_interval and self.iteration % log_interval == 0:
            self.dump_logs(self.iteration)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The last rollout may go beyond the total, and a learning rate below 0 would climb the loss.
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def collect_rollouts(  # type: ignore[override]
        self, env: Any, callback: BaseCallback, rollout_buffer: TrajectoryBuffer, n_rollout_steps: int
    ) -> bool:
        """Fills the buffer with the trajectories of an iteration; False if a callback ended the training."""
        callback.on_rollout_start()
        is_complete = draw_rollout(self, rollout_buffer, callback)
        if is_complete:
            callback.on_rollout_end()
        return is_complete

    @property
    def drawing_transition(self) -> Transition:
        """The transition that draws the images: the policy's own."""
        return self.policy.transition

    def group_of(self, image: int) -> int:
        """Returns the group of an image of the run; the images of a group have the same prompt."""
        return image // self.group_size

    def initial_noise_of(self, images: range) -> list[int] | None:
        """Returns the number of the image whose x_T each image starts from; None for its own."""
        return None

    @abstractmethod
    def train(self) -> None:
        """Updates the model from the rollout buffer."""

    @property
    def nat_price(self) -> float | None:
        """beta of the objective E[r] - beta KL that the algorithm maximises, reward per nat; None without such an
        objective."""
        return None

    def is_done(self, total_timesteps: int) -> bool:
        """Returns whether ``learn`` has nothing left to do for these denoising steps in all."""
        return self.num_timesteps >= total_timesteps

    def count_optimizer_steps(self, total_images: int) -> int | None:
        """Returns the optimiser steps of a training of so many images; None if each image takes its share of them."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Returns all that going on exactly needs: ``{"tensors": {group: {name: tensor}}, "state": JSON-able}``."""
        return get_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of another algorithm, sampler or network.
        """
        set_state(self, state)
        self._anchor = None  # its images belong to the seed, which may be another one now

    def algorithm_state(self) -> dict[str, Any]:
        """Returns the JSON-able state of an algorithm beside weights and counters; subclasses add to it."""
        return {"reward_statistics": self.reward_normalizer.state_dict()} if self.reward_normalizer else {}

    def load_algorithm_state(self, state: Mapping[str, Any]) -> None:
        """Goes on with what :meth:`algorithm_state` returned."""
        # They begin anew if the agent was loaded with other arguments than it was saved with.
        if self.reward_normalizer and "reward_statistics" in state:
            self.reward_normalizer.load_state_dict(state["reward_statistics"])

    def save(self, path: Any) -> None:  # type: ignore[override]
        """Writes a zip file that :meth:`load` reads: the constructor's arguments and the :meth:`state_dict`.

        Args:
            path: of the file, or an open one.
        """
        state = self.state_dict()
        # The number of environments is a matter of speed; the images of an iteration are not.
        given_anew = ("policy", "env", "device", "n_envs", "_init_setup_model")
        arguments = {name: value for name, value in self._arguments.items() if name not in given_anew}
        data = {
            "policy_class": self.policy_class,
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "arguments": arguments | {"images_per_iteration": self.images_per_iteration},
            "state": state["state"],
        }
        save_to_zip_file(path, data, state["tensors"])

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfAlgorithm],
        path: Any,
        env: GymEnv | VectorEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """Loads what :meth:`save` wrote.

        The file holds a pickle, which can run code of whoever wrote it: load only files that you trust. The folders
        that ``dpok train`` writes hold none.

        Args:
            path: of the file, or an open one.
            env: any denoising environment with the sampler that was learned; None to draw only.
            device: where the policy runs, as for the constructor.
            custom_objects: what to take in place of entries of the file, see SB3.
            print_system_info: whether to print on what system the file was written, and on what it is read.
            **kwargs: arguments of the constructor that change; they are checked there.

        Raises:
            TypeError: if there is no such argument.
            ValueError: if an argument is out of range, the file is of another algorithm, or the environment has another
                model, number of steps or latent shape than the agent.
        """
        data, tensors, _ = load_from_zip_file(path, True, custom_objects, "cpu", print_system_info=print_system_info)
        if not data or not data.keys() >= {"policy_class", "arguments", "state"}:
            raise ValueError(f"{path} was not written by save() of this version; save the agent again")
        check_algorithm(cls, data["state"])
        agent = cls(data["policy_class"], env, device=device, _init_setup_model=False, **data["arguments"] | kwargs)
        agent.sampler_config = SamplerConfig.from_dict(data["state"]["sampler"])
        if env is None:
            agent.observation_space, agent.action_space = data["observation_space"], data["action_space"]
        run_seed = agent.run_seed
        agent._setup_model()
        agent.load_state_dict({"tensors": tensors, "state": data["state"]})
        if kwargs.get("seed") is not None:
            agent.run_seed = run_seed
        return agent


def _shaped(schedule: Schedule, warmup: float, final_fraction: float, progress_remaining: float) -> float:
    """A learning rate that also rises linearly at first, and falls linearly to a fraction of itself.

    The remaining progress goes from 1 to 0.
    """
    rising = min((1 - progress_remaining) / warmup, 1) if warmup else 1
    return schedule(progress_remaining) * rising * (final_fraction + (1 - final_fraction) * progress_remaining)
