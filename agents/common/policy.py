"""The denoising network as an actor, with a critic beside it.

Letters used for shapes: B states, C x h x w a latent.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from agents.common import distributed
from agents.common.critic import CriticKind, RewardCritic, ValueNetwork
from agents.common.model_card import lora_notes
from agents.common.precision import Precision, checkpoint, faster_precision, in_precision
from agents.common.slow_copy import SlowCopy
from dpok_gym import diffusion
from dpok_gym.models.base import GuidanceGradient
from dpok_gym.models.lora import LoRA, reference_copy
from dpok_gym.models.lora_files import MAX_RANK
from dpok_gym.prompts import prompts_from_bytes
from dpok_gym.samplers import DenoisingProcess, SamplerConfig, State
from dpok_gym.utils.batching import BatchSize
from dpok_gym.utils.sharding import is_sharded, sharded_copy
from dpok_gym.utils.validation import check_choice, check_integer, check_names, check_path

#: An eps far below any gradient: a step of AdamW then does not depend on the scale of the loss.
DEFAULT_OPTIMIZER_KWARGS = {"weight_decay": 0.0, "eps": 1e-15}


class DenoisingPolicy(ActorCriticPolicy):
    """p_theta(x_{t-1} | x_t, z) of a diffusion model, and V(x_t, t, z).

    It trains a LoRA on the denoiser, which leaves the shared model as it was, or a copy of the whole denoiser. The
    reference policy is the pre-trained model: the LoRA switched off, or the original network. The policy's parameters,
    and so the optimiser's, are the trained ones only. Some algorithms have an old policy too: a copy of the trained
    weights that follows them slowly, see :meth:`old_weights`.

    ``predict(..., deterministic=True)`` takes the mean of each step. A diffusion sampler without its noise draws poor
    images, so evaluate with ``deterministic=False``.

    Args:
        observation_space: of a denoising environment.
        action_space: of a denoising environment.
        lr_schedule: learning rate of the denoiser by remaining progress (1 to 0).
        use_sde: must be False.
        process: the denoising process of the environment, or the settings of one.
        guidance_gradient: "both" differentiates the guided output; "conditional" takes its unconditional part as a
            constant, which saves about a third of the update's time and half of its memory.
        lora_rank: rank of the LoRA, usually 4 to 16; 0 trains a copy of the whole denoiser instead; None for the rank
            that suits the model, 8 for diffusion models of the usual size.
        lora: file or folder of a LoRA to start from; its ranks and layers count, in place of ``lora_rank`` and
            ``target_modules``. The reference stays the pre-trained model, so the KL counts what this LoRA changes too.
        target_modules: layers that get a LoRA: "attention" is usual for large models; "all" has convolutions and
            feed-forward layers too, which small models need; or ends of layer names.
        precision: "float32", or "bfloat16" for the denoiser's calls, or "auto" for the one that is faster on this
            device, see :func:`agents.common.precision.faster_precision`; a training that goes on keeps the one that it
            began with. The trained weights and the transitions stay float32.
        gradient_checkpointing: compute parts of the denoiser again in the backward pass instead of keeping all of it:
            about a third slower, for a fraction of the memory. "auto" does so if memory asks for it, see
            :func:`agents.common.memory.asks_for_checkpointing`. No number changes.
        max_batch_size: most states in one call of the denoiser when no gradient is needed, at least 1; None for no
            limit, "auto" for as many as fit into memory.
        micro_batch_size: states that a gradient goes through at a time, at least 1, which ``gradient_checkpointing``
            "auto" reckons with; the algorithm decides.
        critic_hidden: width of the layers of the critic "network", at least 1.
        optimizer_class: a torch optimiser.
        optimizer_kwargs: arguments of the optimiser, such as ``{"weight_decay": 0.01}``; the learning rate is the
            algorithm's. None for :data:`DEFAULT_OPTIMIZER_KWARGS`, which suit AdamW.
        use_critic: add a critic; the algorithm decides.
        critic_kind: "network" or "reward"; the algorithm decides.
        critic_kwargs: arguments of :class:`~agents.common.critic.RewardCritic` but for the process, such as
            ``{"look_fraction": 0.2}``; without effect if there is no such critic.
        keep_old: keep an old policy; the algorithm decides.

    Attributes:
        old: the old policy's weights, or None.
        precision: of the denoiser's calls, "float32" or "bfloat16".
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        use_sde: bool = False,
        *,
        process: DenoisingProcess | Mapping[str, Any],
        guidance_gradient: GuidanceGradient = "both",
        lora_rank: int | None = None,
        lora: str | Path | None = None,
        target_modules: str | Sequence[str] = "attention",
        precision: Precision | Literal["auto"] = "float32",
        gradient_checkpointing: bool | Literal["auto"] = False,
        max_batch_size: int | Literal["auto"] | None = 64,
        micro_batch_size: int = 1,
        critic_hidden: int = 256,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        use_critic: bool = False,
        critic_kind: CriticKind = "network",
        critic_kwargs: dict[str, Any] | None = None,
        keep_old: bool = False,
    ) -> None:
        if use_sde:
            raise ValueError("use_sde must be False: the noise of a denoising step is that of the diffusion")
        check_choice("guidance_gradient", guidance_gradient, "both", "conditional")
        # ActorCriticPolicy would build feature extractors and an action head; only its interface is wanted.
        BasePolicy.__init__(
            self,
            observation_space,
            action_space,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs or DEFAULT_OPTIMIZER_KWARGS,
        )
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise TypeError(f"optimizer_class must be a class of torch.optim, got {optimizer_class!r}")
        if isinstance(process, Mapping):
            process = DenoisingProcess.from_config(SamplerConfig.from_dict(process))
        self.process = process
        self.model = process.model
        self.guidance_gradient: GuidanceGradient = guidance_gradient
        check_choice("precision", precision, "float32", "bfloat16", "auto")
        check_choice("gradient_checkpointing", gradient_checkpointing, True, False, "auto")
        self._batch_size = BatchSize("max_batch_size", max_batch_size)
        # Resolved here, so that a saved policy does not depend on the default of a later version.
        rank = self.model.default_lora_rank if lora_rank is None else lora_rank
        if lora is not None and lora_rank == 0:
            raise ValueError(
                "lora_rank=0 trains the whole denoiser, which starts from no LoRA; choose another lora_rank, such as "
                "8, or leave the LoRA out"
            )
        check_integer("lora_rank", rank, minimum=0, maximum=MAX_RANK)
        check_integer("critic_hidden", critic_hidden, maximum=2**16)
        self._constructor = {
            "process": process.config.to_dict(),
            "guidance_gradient": guidance_gradient,
            "lora_rank": rank,
            "lora": None if lora is None else str(check_path("the LoRA", lora)),
            "target_modules": target_modules,
            "precision": precision,
            "gradient_checkpointing": gradient_checkpointing,
            "max_batch_size": max_batch_size,
            "micro_batch_size": check_integer("micro_batch_size", micro_batch_size),
            "critic_hidden": critic_hidden,
            "use_critic": use_critic,
            "critic_kind": critic_kind,
            "critic_kwargs": critic_kwargs,
            "keep_old": keep_old,
        }
        self._make_trainable(rank, target_modules, lora)
        self.gradient_checkpointing = self._is_checkpointing = False  # while the precision is measured
        self.precision: Precision = faster_precision(self) if precision == "auto" else precision
        self.gradient_checkpointing = gradient_checkpointing is True
        if gradient_checkpointing == "auto":
            from agents.common.memory import asks_for_checkpointing  # diffusers takes seconds to import

            self.gradient_checkpointing = asks_for_checkpointing(self)
        with self._checkpointing():  # now, as a network may refuse
            pass
        if self._batch_size.is_automatic and is_sharded(self.model.denoiser):
            raise ValueError(
                "the ranks call a denoiser that is spread over them together, so none can choose its own "
                "max_batch_size: give a number"
            )
        if keep_old and is_sharded(self.denoiser):
            raise ValueError(
                "this algorithm keeps a copy of its old weights, which it cannot of a denoiser that is trained as a "
                "whole and spread over the ranks: train a LoRA (lora_rank above 0), or leave out shard"
            )
        self.old = SlowCopy(self._named_denoiser_parameters()) if keep_old else None
        self.critic: ValueNetwork | RewardCritic | None = None
        check_choice("critic_kind", critic_kind, "network", "reward")
        # Checked without such a critic too: presets give them to all algorithms.
        of_critic = [name for name in inspect.signature(RewardCritic).parameters if name != "process"]
        check_names("argument in critic_kwargs", critic_kwargs or {}, of_critic)
        if use_critic and critic_kind == "network":
            shape, width = self.model.latent_shape, self.model.text_width
            self.critic = ValueNetwork(shape, width, process.num_inference_steps, critic_hidden)
            self.critic.to(self.model.device)
        elif use_critic:
            self.critic = RewardCritic(process, **critic_kwargs or {})
        # Two groups, so that the critic can have a learning rate of its own.
        groups: list[dict[str, Any]] = [{"params": self.denoiser_parameters()}]
        if isinstance(self.critic, ValueNetwork):
            groups.append({"params": list(self.critic.parameters())})
        known = inspect.signature(optimizer_class).parameters
        check_names(f"argument of {optimizer_class.__name__}", self.optimizer_kwargs, known)
        self.optimizer = optimizer_class(groups, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _make_trainable(self, lora_rank: int, target_modules: str | Sequence[str], start: str | Path | None) -> None:
        """Makes the LoRA, or for rank 0 the copy of the denoiser."""
        self.lora: LoRA | None = None
        self.denoiser: nn.Module | None = None
        if start is not None:
            allow_pickle = self.model.options.get("allow_pickle", False)
            self.lora = LoRA.from_folder(self.model.denoiser, start, self.model.lora_prefix, allow_pickle)
        elif lora_rank:
            self.lora = LoRA(self.model.denoiser, lora_rank, self._layer_names(target_modules))
        if self.lora is not None:
            # A parameter's name in a module must have no dots; nor must it depend on how many LoRAs were made before.
            names = {name: name.replace(f".{self.lora.name}.", ".").replace(".", "/") for name in self.lora.parameters}
            self.adapter = nn.ParameterDict({names[name]: value for name, value in self.lora.parameters.items()})
            return
        if "dtype" in self.model.options:
            raise ValueError(
                f"the steps of an optimiser are lost in the digits of {self.model.options['dtype']}: to train the "
                "whole denoiser, use dtype='float32', with precision='bfloat16' for speed; or train a LoRA"
            )
        if is_sharded(self.model.denoiser):
            self.denoiser = sharded_copy(self.model.denoiser)
            return
        self.denoiser = reference_copy(self.model.denoiser).requires_grad_(True)
        if self.model.options.get("compile"):
            self.denoiser.compile()

    def _layer_names(self, target_modules: str | Sequence[str]) -> Sequence[str]:
        """Returns the ends of the names of the layers that get a LoRA."""
        if not isinstance(target_modules, str):
            return target_modules
        if not self.model.lora_layers:
            raise ValueError(f"the model {self.model.name!r} has no layers for a LoRA; use lora_rank=0")
        check_choice("target_modules", target_modules, *self.model.lora_layers)
        return self.model.lora_layers[target_modules]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
            **self._constructor,
        }

    def denoiser_parameters(self) -> list[nn.Parameter]:
        """Returns the trained parameters of the denoiser, without the critic's."""
        return list(self._named_denoiser_parameters().values())

    def _named_denoiser_parameters(self) -> dict[str, nn.Parameter]:
        trained = self.adapter if self.lora else self.denoiser
        assert trained is not None
        return dict(trained.named_parameters())

    def merged_denoiser(self) -> nn.Module:
        """Returns the trained denoiser as an ordinary network: the whole one, or a copy with the LoRA merged in.

        Raises:
            ValueError: if the denoiser is spread over the ranks.
        """
        if is_sharded(self.model.denoiser):
            raise ValueError(
                "the denoiser is spread over the ranks: load the run in a single process, or save its LoRA (save_lora)"
            )
        if self.lora is None:
            assert self.denoiser is not None
            return self.denoiser
        return self.lora.merged_copy()

    def set_training_mode(self, mode: bool) -> None:
        """Does nothing: in training mode, dropout would make the first importance ratio differ from 1."""

    @contextmanager
    def adapter_enabled(self, enabled: bool = True) -> Iterator[None]:
        """Within the block the denoiser is the trained one, in backward passes too; with False, the reference.

        Its gradient checkpointing is this policy's.
        """
        # A denoiser of its own needs no switch.
        switched = nullcontext() if self.lora is None else self.lora.enabled() if enabled else self.lora.disabled()
        with switched, self._checkpointing():
            yield

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Within the block the denoiser checkpoints gradients if this policy asks for it: others may share it."""
        # The outermost block holds: its backward passes compute as the calls in it did.
        if not self.gradient_checkpointing or self._is_checkpointing or not torch.is_grad_enabled():
            yield
            return
        network: Any = self.denoiser or self.model.denoiser
        # Only where the precision asks for it: other people's networks may take no function.
        network.enable_gradient_checkpointing(*[checkpoint] * (self.precision == "bfloat16"))
        self._is_checkpointing = True
        try:
            yield
        finally:
            network.disable_gradient_checkpointing()
            self._is_checkpointing = False

    @contextmanager
    def old_weights(self) -> Iterator[None]:
        """Within the block, without gradients, the policy answers as the old one.

        Raises:
            ValueError: if the policy keeps no old one.
        """
        if self.old is None:
            raise ValueError("this policy keeps no old weights: make it with keep_old=True")
        with torch.no_grad(), self.old.in_place():
            yield

    def predict_output(self, state: State, reference: bool = False, guidance_scale: float | None = None) -> Tensor:
        """The denoiser's output for B states, (B, C, h, w) float32.

        Args:
            state: B states; there may be none.
            reference: whether to ask the pre-trained model.
            guidance_scale: None for the process's own; 1 for no guidance.
        """
        n = len(state.latents)
        if is_sharded(self.model.denoiser) and not torch.is_grad_enabled():
            # The ranks call it together, hence equally often. With gradients, their micro-batches are as many.
            state = state.padded(distributed.largest(n))
        if not len(state.latents):
            return state.latents
        # A policy with a LoRA has no denoiser of its own: the adapter's switch decides which model answers.
        denoiser = None if reference else self.denoiser

        def predict(rows: slice) -> Tensor:
            return self.process.predict(state[rows], guidance_scale, denoiser, self.guidance_gradient)

        with in_precision(self.precision, self.model.device), self.adapter_enabled(not reference):
            # With gradients the caller has chosen the micro-batch; without, memory alone sets the limit.
            if torch.is_grad_enabled():
                return predict(slice(None))
            return self._batch_size.map(predict, len(state.latents))[:n]

    def transition(self, state: State, reference: bool = False) -> tuple[Tensor, Tensor]:
        """Mean (B, C, h, w) and std (B,) of p(x_{t-1} | x_t, z), float32.

        Args:
            state: B states.
            reference: whether to ask the pre-trained model.
        """
        output = self.predict_output(state, reference)
        return self.process.mean_of_output(state, output), self.process.table.std[state.step]

    @torch.no_grad()
    def reference_transition(self, state: State) -> tuple[Tensor, Tensor]:
        """Mean (B, C, h, w) and std (B,) of the pre-trained model's p(x_{t-1} | x_t, z), without a gradient."""
        return self.transition(state, reference=True)

    def old_transition(self, state: State) -> tuple[Tensor, Tensor]:
        """Mean (B, C, h, w) and std (B,) of the old policy's p(x_{t-1} | x_t, z), without a gradient."""
        with self.old_weights():
            return self.transition(state)

    def values(self, state: State) -> Tensor:
        """V(x_t, t, z) of B states as the critic's network sees it, (B,); 0 without a critic."""
        if self.critic is None:
            return torch.zeros(len(state.latents), device=state.latents.device)
        assert isinstance(self.critic, ValueNetwork)
        return self.critic(state.latents, state.step, self.model.text_features(state.conditioning))

    def state_of(self, obs: PyTorchObs) -> State:
        """Returns the states that observations show: ``latent``, ``step`` and ``prompt``, in bytes."""
        assert isinstance(obs, dict)
        device = self.model.device
        prompts = prompts_from_bytes(obs["prompt"].to("cpu", torch.uint8).numpy())
        return State(obs["latent"].to(device), obs["step"].long().flatten().to(device), self.process.encode(prompts))

    def _observed_values(self, obs: PyTorchObs, state: State, mean: Tensor | None = None) -> Tensor:
        """V(x_t, t, z) of B observations, (B,).

        Args:
            obs: B observations.
            state: the states that they show.
            mean: (B, C, h, w) of the transitions, if it is known already.
        """
        if not isinstance(self.critic, RewardCritic):
            return self.values(state)
        assert isinstance(obs, dict)
        if mean is None:
            mean = self.transition(state)[0]
        prompts = prompts_from_bytes(obs["prompt"].to("cpu", torch.uint8).numpy())
        return self.critic.state_values(state, mean.detach(), prompts)

    def _act(self, state: State, deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns actions (B, C, h, w), their log-probabilities (B,) in nats, and the means (B, C, h, w)."""
        mean, std = self.transition(state)
        action = mean if deterministic else diffusion.sample(mean, std, torch.randn_like(mean))
        return action, diffusion.log_prob(action, mean, std), mean

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions (B, C, h, w), values (B,) and log-probabilities (B,) in nats."""
        state = self.state_of(obs)
        action, log_prob, mean = self._act(state, deterministic)
        return action, self._observed_values(obs, state, mean), log_prob

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return self._act(self.state_of(observation), deterministic)[0]

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """V(x_t, t, z) of observations, (B,)."""
        return self._observed_values(obs, self.state_of(obs))

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, log-probabilities and entropies of actions (B, C, h, w) or (B, C*h*w); all (B,), in nats.

        At a deterministic step the last two are 0.
        """
        state = self.state_of(obs)
        mean, std = self.transition(state)
        log_prob = diffusion.log_prob(actions.reshape(mean.shape), mean, std)
        # The entropy of a Gaussian is minus its log-density at the mean, plus half a nat for each dimension.
        entropy = -diffusion.log_prob(mean, mean, std) + 0.5 * mean[0].numel() * (std > 0)
        return self._observed_values(obs, state, mean), log_prob, entropy

    def get_distribution(self, obs: PyTorchObs) -> DiagGaussianDistribution:
        """Returns the Gaussian over the flattened next latent.

        Raises:
            ValueError: if a state's denoising step adds no noise.
        """
        state = self.state_of(obs)
        mean, std = self.transition(state)
        if not std.all():
            raise ValueError(
                f"denoising step {int(state.step[std == 0][0])} adds no noise, so its action has no distribution: ask "
                "predict() for it, or sample with noise at each step (eta above 0, no sde_steps)"
            )
        flat = mean.flatten(1)
        return DiagGaussianDistribution(flat.shape[1]).proba_distribution(flat, std.log()[:, None].expand_as(flat))

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that this policy was made with, without its denoising process."""
        return {name: value for name, value in self._constructor.items() if name != "process"}

    def _get_lora(self) -> LoRA:
        if self.lora is None:
            raise ValueError("this policy trains the whole denoiser (lora_rank=0) and has no LoRA")
        return self.lora

    def save_lora(self, folder: str | Path) -> Path:
        """Writes the LoRA as diffusers' ``load_lora_weights(folder)`` reads it; returns the file's path."""
        return self._get_lora().save(folder, self.model.lora_prefix, lora_notes(self.process))

    def load_lora(self, folder: str | Path) -> None:
        """Reads a LoRA of the same model, rank and layers; errors as :meth:`dpok_gym.models.lora.LoRA.load`."""
        self._get_lora().load(folder, self.model.lora_prefix)
