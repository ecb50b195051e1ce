"""What every algorithm that learns from its own denoising trajectories shares: environments, rollouts, saving."""

from __future__ import annotations

import io
import pathlib
import time
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

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

import dpok_gym  # noqa: F401  (registers the environments)
from agents.policy import DenoisingPolicy
from agents.rollout_buffer import TrajectoryBuffer
from agents.sb3_vec_env import GymVectorVecEnv
from dpok_gym.vector_env import LATENT_BOUND

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="DenoisingAlgorithm")


class DenoisingAlgorithm(OnPolicyAlgorithm):
    """Collects whole trajectories with a :class:`~agents.policy.DenoisingPolicy`; subclasses write ``train()``.

    Args:
        policy: "DenoisingPolicy", or a subclass of it.
        env: an id such as "DPOK-Shapes-v0", a Gymnasium environment or vector environment, or an SB3 ``VecEnv``.
        learning_rate: of the denoiser; a function of the remaining progress, 1 to 0, is allowed.
        n_steps: denoising steps of each environment in a rollout, a multiple of T; None for T, one picture each.
        n_envs: environments when ``env`` is an id: pictures drawn side by side.
        gamma: discount per denoising step; the papers have none (1).
        gae_lambda: 1 for Monte-Carlo returns, as the papers; less trusts the critic more.
        normalize_advantage: whether a rollout's advantages get mean 0 and standard deviation 1.
        vf_learning_rate: learning rate of the critic.
        max_grad_norm: largest norm of the denoiser's gradient.
        stats_window_size: episodes that the logged means of rewards go over.
        tensorboard_log: folder for TensorBoard.
        policy_kwargs: arguments of the policy, see :class:`~agents.policy.DenoisingPolicy`.
        verbose: 0 silent, 1 logs to the console.
        seed: of everything random.
        device: of the policy, "auto" for a GPU if there is one; should be the environment's.
        _init_setup_model: SB3's own.

    Raises:
        ValueError: if the environment is none that a denoising policy can act in, or ``n_steps`` no multiple of T.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"DenoisingPolicy": DenoisingPolicy}
    policy: DenoisingPolicy
    rollout_buffer: TrajectoryBuffer  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[DenoisingPolicy],
        env: GymEnv | VectorEnv | str | None,
        learning_rate: float | Schedule,
        n_steps: int | None,
        n_envs: int,
        gamma: float,
        gae_lambda: float,
        normalize_advantage: bool,
        vf_learning_rate: float,
        max_grad_norm: float,
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
        self.normalize_advantage = normalize_advantage
        self.vf_learning_rate = vf_learning_rate
        #: How the environment samples, from ``env.sampler``; kept so that a saved agent can be loaded without one.
        self.sampler: dict[str, Any] | None = None
        self._random_state: dict[str, Any] | None = None
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,  # type: ignore[arg-type]
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=0.0,
            vf_coef=0.0,
            max_grad_norm=max_grad_norm,
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

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
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
        kwargs = {"vf_learning_rate": self.vf_learning_rate, **self.sampler, **self.policy_kwargs}
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

    def _check_sampler(self, env: VecEnv) -> None:
        """Takes the sampler's settings from the environment, or checks that they are those learned with."""
        sampler = _sampler_of(env)
        if not np.all(env.action_space.high == LATENT_BOUND):  # type: ignore[attr-defined]
            raise ValueError(
                "DenoisingPolicy's action is the next latent itself: use the environment without NoiseAction"
            )
        _check_same_sampler(self.sampler, sampler)
        self.sampler = sampler

    def set_env(self, env: GymEnv | VectorEnv, force_reset: bool = True) -> None:
        """Puts the agent on another environment, which must sample as the one it was made for."""
        wrapped = self._wrap_env(env, self.verbose)
        self._check_sampler(wrapped)
        super().set_env(wrapped, force_reset)

    def _update_learning_rate(self, optimizers: Any) -> None:
        super()._update_learning_rate(optimizers)
        self.policy.optimizer.param_groups[1]["lr"] = self.vf_learning_rate
        self.logger.record("train/vf_learning_rate", self.vf_learning_rate)

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
        self._last_obs = env.reset()  # type: ignore[assignment]
        for n_collected in range(n_rollout_steps):
            episode, t = divmod(n_collected, n_denoising)
            rows = slice(episode * env.num_envs, (episode + 1) * env.num_envs)
            observation = obs_as_tensor(self._last_obs, self.policy.model.device)  # type: ignore[arg-type]
            with torch.no_grad():
                actions, means, _ = self.policy.act(observation)
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
                valid = [info.get("reward_valid", True) for info in infos]
                rollout_buffer.valid[rows] = torch.as_tensor(valid, device=rollout_buffer.valid.device)
                for info, sound in zip(infos, valid, strict=True):
                    for name, value in info.get("rewards", {}).items() if sound else ():
                        components.setdefault(name, []).append(value)
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
        rollout_buffer.finish(self.gamma, self.gae_lambda, self.normalize_advantage)
        pictures = n_rollout_steps // n_denoising * env.num_envs
        self.logger.record("rollout/pictures", self.num_timesteps // n_denoising)
        self.logger.record("rollout/valid_share", rollout_buffer.valid.float().mean().item())
        self.logger.record("time/rollout_pictures_per_second", pictures / (time.perf_counter() - started))
        for name, found in components.items():
            # SB3's console cuts off what is longer; the ends of names differ where they begin with the same address.
            self.logger.record(f"rollout/{name[-28:]}", float(np.mean(found)))
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _values(self, observation: Any) -> torch.Tensor:
        """The baseline of each state, (n,)."""
        return self.policy.predict_values(observation)

    def _on_denoised(
        self, rows: slice, t: int, buffer: TrajectoryBuffer, observation: Any, means: torch.Tensor
    ) -> None:
        """For algorithms that add to the rewards of a step."""

    def _capture_random_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "numpy": np.random.get_state()}  # noqa: NPY002 (SB3's)
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        if self.env is not None and self._last_obs is not None:  # before its first reset it may have no generators
            state["env"] = [generator.bit_generator.state for generator in self.env.get_attr("np_random")]
            state["rewards"] = [reward.state_dict() for reward in self.env.get_attr("reward")]
        return state

    def _restore_random_state(self, env: VecEnv) -> None:
        """Puts generators and rewards where they were when the agent was saved; once, before its first rollout."""
        state, self._random_state = self._random_state, None
        if state is None:
            return
        torch.set_rng_state(state["torch"])
        np.random.set_state(state["numpy"])  # noqa: NPY002 (SB3's)
        if torch.cuda.is_available() and len(state.get("cuda", [])) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        generators = env.get_attr("np_random")
        for generator, saved in zip(generators, state.get("env", []), strict=False):
            generator.bit_generator.state = saved
        for reward, saved in zip(env.get_attr("reward"), state.get("rewards", []), strict=False):
            reward.load_state_dict(saved)

    def save(self, path: str | pathlib.Path | io.BufferedIOBase, *args: Any, **kwargs: Any) -> None:
        """Saves as SB3 does, with the random state and the statistics that rewards are normalised by.

        So a loaded agent's next update is the one that this agent would make.
        """
        pending = self._random_state  # of an agent that was loaded and has not gone on yet
        self._random_state = pending or self._capture_random_state()
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
            _check_same_sampler(data["sampler"], _sampler_of(env))  # type: ignore[index]
        return super().load(path, env, **kwargs)

    def save_lora(self, folder: str | pathlib.Path) -> pathlib.Path:
        """Writes the LoRA as diffusers' ``load_lora_weights(folder)`` reads it; returns the file's path."""
        return self.policy.save_lora(folder)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_last_obs", "_last_original_obs"]


def _sampler_of(env: VecEnv) -> dict[str, Any]:
    try:
        return env.get_attr("sampler")[0]
    except AttributeError:
        raise ValueError(
            f"a denoising policy needs a denoising environment such as DPOK-Shapes-v0, got {env}"
        ) from None


def _check_same_sampler(known: Mapping[str, Any] | None, found: Mapping[str, Any]) -> None:
    """Refuses an environment that does not denoise as the agent learned to."""
    if known is None:
        return
    different = [name for name in known if known[name] != found.get(name)]
    if different:
        details = ", ".join(f"{name} {known[name]!r} there, {found.get(name)!r} here" for name in different)
        raise ValueError(
            f"the agent was made for another sampler ({details}); make the environment with the agent's settings"
        )
