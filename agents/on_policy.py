"""What every algorithm that learns from its own denoising trajectories shares: environments, rollouts, saving."""

from __future__ import annotations

import io
import pathlib
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor
from torch import Tensor, nn

import dpok_gym  # noqa: F401  (registers the environments)
from agents import random_state
from agents.policy import DenoisingPolicy
from agents.rollout_buffer import Batch, TrajectoryBuffer
from agents.sampler import check_same_sampler, sampler_of
from agents.sb3_vec_env import GymVectorVecEnv
from dpok_gym.checks import fraction, integer, positive
from dpok_gym.memory import BatchSize
from dpok_gym.vector_env import LATENT_BOUND

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="DenoisingAlgorithm")

#: What an update logs, by name: tensors of one number for each of the transitions, or whatever was learned from.
Found = dict[str, list[Tensor]]


class DenoisingAlgorithm(OnPolicyAlgorithm):
    """Collects whole trajectories with a :class:`~agents.policy.DenoisingPolicy`, and takes optimiser steps.

    Subclasses write ``train()``, inside ``with self._update(...) as found``, and the loss of what they learn from.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: an id such as "DPOK-Shapes-v0", a Gymnasium environment or vector environment, or an SB3 ``VecEnv``.
        learning_rate: of the denoiser. A LoRA on the embedded model takes 1e-3, on Stable Diffusion 1e-5 to 3e-4; too
            large a rate shows as pictures that fall apart. A function of the remaining progress, 1 to 0, is allowed.
        final_lr_fraction: what is left of the learning rate at the end of ``learn``, in [0, 1], falling linearly; 1
            keeps it. A falling rate averages out the noise of the last updates.
        n_steps: denoising steps of each environment in a rollout, a multiple of T; None for T, one picture each.
        n_envs: environments when ``env`` is an id. More pictures in a rollout mean less noise in the gradient.
        batch_size: of each optimiser step, in what the algorithm learns from; None for all there is.
        micro_batch_size: of each forward and backward pass, whose gradients add up to those of the batch; smaller takes
            less memory and changes nothing else. None for the batch, "auto" for what fits into memory.
        max_grad_norm: largest norm of the denoiser's gradient; infinity for no limit.
        stats_window_size: episodes that the logged means of rewards go over.
        tensorboard_log: folder for TensorBoard.
        policy_kwargs: arguments of :class:`~agents.policy.DenoisingPolicy`, such as ``{"lora_rank": 16}``.
        verbose: 0 silent, 1 logs to the console.
        seed: of everything random.
        device: of the policy, "auto" for a GPU if there is one; should be the environment's.
        _init_setup_model: SB3's own.

    Raises:
        ValueError: if an argument is out of range, or the environment is no denoising environment.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"DenoisingPolicy": DenoisingPolicy}
    policy: DenoisingPolicy
    rollout_buffer: TrajectoryBuffer  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[DenoisingPolicy] = "DenoisingPolicy",
        env: GymEnv | VectorEnv | str | None = None,
        learning_rate: float | Schedule = 1e-3,
        final_lr_fraction: float = 1.0,
        n_steps: int | None = None,
        n_envs: int = 64,
        batch_size: int | None = None,
        micro_batch_size: int | Literal["auto"] | None = 128,
        max_grad_norm: float = 1.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if isinstance(env, str):
            env = gymnasium.make_vec(env, num_envs=n_envs, vectorization_mode="vector_entry_point")
        self.final_lr_fraction = fraction("final_lr_fraction", final_lr_fraction)
        self.batch_size = None if batch_size is None else integer("batch_size", batch_size)
        self.micro_batch_size = micro_batch_size
        #: How the environment samples, from ``env.sampler``; kept so that a saved agent can be loaded without one.
        self.sampler: dict[str, Any] | None = None
        self._random_state: dict[str, Any] | None = None
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,  # type: ignore[arg-type]
            gamma=1.0,
            gae_lambda=1.0,
            ent_coef=0.0,
            vf_coef=0.0,
            max_grad_norm=positive("max_grad_norm", max_grad_norm),
            use_sde=False,
            sde_sample_freq=-1,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    @staticmethod
    def _wrap_env(env: GymEnv | VectorEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, VectorEnv):
            return VecMonitor(GymVectorVecEnv(env))
        return OnPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        self.lr_schedule = partial(_falling, self.lr_schedule, self.final_lr_fraction)

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self._micro_batches = BatchSize("micro_batch_size", self.micro_batch_size)
        self.set_random_seed(self.seed)
        if self.env is not None:
            self._check_sampler(self.env)
        if self.sampler is None:
            raise ValueError("an environment is needed to set the agent up: pass env='DPOK-Shapes-v0', for example")
        n_denoising = self.sampler["num_inference_steps"]
        self.n_steps = self.n_steps or n_denoising
        if self.n_steps < 1 or self.n_steps % n_denoising:
            raise ValueError(
                f"n_steps={self.n_steps} must be a multiple of the {n_denoising} denoising steps of the environment, "
                f"for example {max(1, round(self.n_steps / n_denoising)) * n_denoising}, as rewards come with pictures"
            )
        if clashing := sorted(self.sampler.keys() & self.policy_kwargs.keys()):
            raise ValueError(f"the environment decides {', '.join(clashing)}: set it there and not in policy_kwargs")
        if self.sampler["model_kwargs"].get("dtype") == "float16":
            raise ValueError(
                "float16 can draw but not learn: the gradient of an element of an output is below its smallest number; "
                "use dtype='bfloat16'"
            )
        kwargs = {**self.sampler, **self.policy_kwargs}
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, device=str(self.device), **kwargs
        )
        spaces = self.observation_space.spaces  # type: ignore[union-attr, attr-defined]
        self.rollout_buffer = TrajectoryBuffer(
            self.n_steps // n_denoising * self.n_envs,
            n_denoising,
            spaces["latent"].shape,
            spaces["prompt"].shape[0],
            self.policy.model.device,
        )

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seeds all generators as SB3 does, but lets no two runs share an environment's.

        SB3's environment i gets ``seed + i``: of 64, runs 0 and 1 would share 63, with their noise and prompts.
        """
        super().set_random_seed(seed)
        self._last_obs = None  # the environments begin anew
        if seed is not None and self.env is not None:
            self.env.seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))

    def _check_sampler(self, env: VecEnv) -> None:
        """Takes the sampler's settings from the environment, or checks that they are those learned with."""
        sampler = sampler_of(env)
        if not np.all(env.action_space.high == LATENT_BOUND):  # type: ignore[attr-defined]
            raise ValueError(
                "DenoisingPolicy's action is the next latent itself: use the environment without NoiseAction"
            )
        check_same_sampler(self.sampler, sampler)
        self.sampler = sampler

    def set_env(self, env: GymEnv | VectorEnv, force_reset: bool = True) -> None:
        """Puts the agent on another environment, which must sample as the one it was made for."""
        wrapped = self._wrap_env(env, self.verbose)
        self._check_sampler(wrapped)
        super().set_env(wrapped, force_reset)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        # It may reset the environments, which draws from their generators: an agent that was loaded does that before
        # its random state is put back, and this one must go on as that one does.
        if self._random_state is None and self._last_obs is not None:
            self._random_state = random_state.capture(self.env, begun=True)
        return super()._setup_learn(*args, **kwargs)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The last rollout may go beyond the total, and a learning rate below 0 would climb the loss.
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def collect_rollouts(  # type: ignore[override]
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: TrajectoryBuffer, n_rollout_steps: int
    ) -> bool:
        """Fills the buffer with whole trajectories, each begun anew; False if a callback stopped it."""
        self._restore_random_state(env)
        self.policy.set_training_mode(False)
        started, n_denoising = time.perf_counter(), len(self.policy.schedule)
        components: dict[str, list[float]] = {}
        rollout_buffer.rewards.zero_()
        rollout_buffer.valid.fill_(True)
        callback.on_rollout_start()
        for n_collected in range(n_rollout_steps):
            episode, t = divmod(n_collected, n_denoising)
            if t == 0:
                self._begin_episodes(env, first=episode == 0)
            rows = slice(episode * env.num_envs, (episode + 1) * env.num_envs)
            observation = obs_as_tensor(self._last_obs, self.policy.model.device)  # type: ignore[arg-type]
            with torch.no_grad():
                actions, means, _ = self._act(observation)
                values = self._values(observation)
            rollout_buffer.add(rows, t, observation, actions, means, values)  # type: ignore[arg-type]
            # No clipping to the action space, as SB3 would have it: its bounds are never reached, and a clipped action
            # would not be the one that was scored.
            self._last_obs, rewards, dones, infos = env.step(actions.cpu().numpy())  # type: ignore[assignment]
            self.num_timesteps += env.num_envs
            self._on_denoised(rows, t, rollout_buffer, observation, means)
            rollout_buffer.rewards[rows, t] += torch.as_tensor(rewards).to(rollout_buffer.rewards)
            if t == n_denoising - 1:
                if not all(dones):
                    raise RuntimeError(f"every episode should end after {n_denoising} steps, but {dones} did")
                rollout_buffer.texts[rows] = [info["prompt"] for info in infos]
                valid = [info.get("reward_valid", True) for info in infos]
                rollout_buffer.valid[rows] = torch.as_tensor(valid, device=rollout_buffer.valid.device)
                for info, sound in zip(infos, valid, strict=True):
                    for name, value in info.get("rewards", {}).items() if sound else ():
                        components.setdefault(name, []).append(value)
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
        self._compute_advantages(rollout_buffer)
        pictures = n_rollout_steps // n_denoising * env.num_envs
        self.logger.record("rollout/pictures", self.num_timesteps // n_denoising)
        self.logger.record("rollout/valid_share", rollout_buffer.valid.float().mean().item())
        self.logger.record("time/rollout_pictures_per_second", pictures / (time.perf_counter() - started))
        for column, found in zip(_columns(components), components.values(), strict=True):
            self.logger.record(f"rollout/{column}", float(np.mean(found)))
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _begin_episodes(self, env: VecEnv, first: bool) -> None:
        """Puts the first observation into ``_last_obs``; the environment has begun later episodes by itself."""
        if first:
            self._last_obs = env.reset()  # type: ignore[assignment]

    def _act(self, observation: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`agents.policy.DenoisingPolicy.act`."""
        return self.policy.act(observation)

    def _values(self, observation: Any) -> Tensor:
        """The baseline of each state, (n,)."""
        return torch.zeros(len(observation["latent"]), device=self.policy.model.device)

    def _on_denoised(self, rows: slice, t: int, buffer: TrajectoryBuffer, observation: Any, means: Tensor) -> None:
        """For algorithms that add to the rewards of a step."""

    def _compute_advantages(self, buffer: TrajectoryBuffer) -> None:
        """For algorithms that learn from advantages, once all rewards are in."""

    @contextmanager
    def _update(self, n_pictures: int) -> Iterator[Found]:
        """Around an update: sets the learning rate; logs the means of what is put into the dict, and the speed.

        Args:
            n_pictures: that the update learns from.
        """
        found: Found = defaultdict(list)
        started = time.perf_counter()
        self._update_learning_rate(self.policy.optimizer)
        yield found
        for name, values in found.items():
            self.logger.record(f"train/{name}", torch.cat(values).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("time/update_pictures_per_second", n_pictures / (time.perf_counter() - started))

    def _take_step(self, batch: Batch, found: Found) -> None:
        """One optimiser step on the batch's mean loss."""
        for name, values in self._micro_batches.run(partial(self._backward, batch), len(batch)).items():
            found[name] += values
        norm = nn.utils.clip_grad_norm_(self.policy.denoiser_parameters(), self.max_grad_norm)
        found["grad_norm"].append(norm[None])
        self.policy.optimizer.step()
        self._n_updates += 1

    def _backward(self, batch: Batch, micro_batch_size: int) -> Found:
        """The gradient of the batch's mean loss, a micro-batch at a time; returns what is worth logging."""
        found: Found = defaultdict(list)
        self.policy.optimizer.zero_grad()
        for part in batch.split(micro_batch_size):
            # The block holds on through the backward pass, which may run parts of the network again.
            reference = self._reference(part)
            with self.policy.tuned():
                loss = self._loss(part, reference, found)
                (loss.sum() / len(batch)).backward()
        return found

    def _reference(self, part: Any) -> Tensor | None:
        """What the loss needs from the pre-trained model, if anything."""
        return None

    @abstractmethod
    def _loss(self, part: Any, reference: Any, found: Found) -> Tensor:
        """The loss of each element of a batch, (B,)."""

    def _restore_random_state(self, env: VecEnv) -> None:
        """Puts generators and rewards where they were when the agent was saved; once, before its first rollout."""
        state, self._random_state = self._random_state, None
        if state is not None:
            random_state.restore(state, env)

    def is_done(self, total_timesteps: int) -> bool:
        """Whether ``learn`` has nothing left to do for these denoising steps in all."""
        return self.num_timesteps >= total_timesteps

    def save(self, path: str | pathlib.Path | io.BufferedIOBase, *args: Any, **kwargs: Any) -> None:
        """Saves as SB3 does, with the random state and the statistics that rewards are normalised by.

        So the next update of an agent that was saved between two rollouts and loaded is the one that this agent would
        make; what it had collected of a rollout is not saved.
        """
        pending = self._random_state  # of an agent that was loaded and has not gone on yet
        self._random_state = pending or random_state.capture(self.env, begun=self._last_obs is not None)
        try:
            super().save(path, *args, **kwargs)
        finally:
            self._random_state = pending

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfAlgorithm], path: Any, env: GymEnv | VectorEnv | None = None, **kwargs: Any
    ) -> SelfAlgorithm:
        """Loads as SB3 does; ``env`` may be a Gymnasium vector environment too.

        Raises:
            ValueError: if the environment has another model, number of steps or latent shape than the agent.
        """
        if env is not None:
            env = cls._wrap_env(env)
            data, _, _ = load_from_zip_file(path, load_data=True, device="cpu")
            check_same_sampler(data["sampler"], sampler_of(env))  # type: ignore[index]
        return super().load(path, env, **kwargs)

    def save_lora(self, folder: str | pathlib.Path) -> pathlib.Path:
        """Writes the LoRA as diffusers' ``load_lora_weights(folder)`` reads it; returns the file's path."""
        return self.policy.save_lora(folder)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_last_obs", "_last_original_obs"]


def _columns(names: Iterable[str]) -> list[str]:
    """Names short enough for SB3's console: the ends of long ones, which differ more often, numbered if they do not."""
    ends = [name[-28:] for name in names]
    before = [ends[:k].count(end) for k, end in enumerate(ends)]
    return [f"{end[4:]} ({n + 1})" if n else end for end, n in zip(ends, before, strict=True)]


def _falling(schedule: Schedule, final_fraction: float, progress_remaining: float) -> float:
    """A learning rate that also falls linearly to a fraction of itself; the progress goes from 1 to 0."""
    return schedule(progress_remaining) * (final_fraction + (1 - final_fraction) * progress_remaining)
