"""The denoising process: a model, a sampler's table and guidance, which together define p(x_{t-1} | x_t, z).

The environment, the policies, evaluation, the simulated person and the benchmarks all use this one class. It is the
only caller of ``model.predict`` and of the table's mean, and it has the only loop over denoising steps.

Letters used for shapes: B images, T denoising steps, C x h x w a latent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpok_gym import diffusion
from dpok_gym.diffusion import expand
from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.models.base import LIVE_PIPELINE, Conditioning, GuidanceGradient
from dpok_gym.models.scheduler_configs import is_flow_matching
from dpok_gym.samplers.ddim import make_ddim_table
from dpok_gym.samplers.flow_matching import KERNELS, Kernel, make_flow_table, read_eta
from dpok_gym.samplers.transition_table import TransitionTable, eta_of_steps
from dpok_gym.utils.validation import check_choice, check_integer, check_names, check_non_negative

#: Arguments of :func:`dpok_gym.models.load_model` that change the distribution of the images. The others only change
#: the precision, the speed, or the files that are read.
_DRAWING_KWARGS = (
    *("image_size", "negative_prompt", "true_cfg_scale", "timestep_spacing"),
    *("revision", "vae", "without_t5"),
)


@dataclass(frozen=True)
class State:
    """A batch of states (z, x_t, t).

    Attributes:
        latents: (B, C, h, w) x_t, float32.
        step: (B,) int64 in [0, T), denoising steps done.
        conditioning: what the denoiser is told about the prompt z: tensors with a leading axis of B.
    """

    latents: Tensor
    step: Tensor
    conditioning: Conditioning

    def __getitem__(self, rows: slice | Tensor) -> State:
        """Returns some of the states."""
        conditioning = {name: values[rows] for name, values in self.conditioning.items()}
        return State(self.latents[rows], self.step[rows], conditioning)

    def padded(self, n: int) -> State:
        """Returns these states, and after them as many of zeros as are missing to ``n``."""

        def pad(values: Tensor) -> Tensor:
            return torch.cat([values, values.new_zeros(n - len(values), *values.shape[1:])])

        conditioning = {name: pad(values) for name, values in self.conditioning.items()}
        return State(pad(self.latents), pad(self.step), conditioning)


@dataclass(frozen=True)
class DenoisingStep:
    """One step of :meth:`DenoisingProcess.denoise`.

    Attributes:
        index: number of the step, 0 for the first (noisiest) one.
        state: the states before it.
        mean: (B, C, h, w) of p(x_{t-1} | x_t, z).
        std: (B,).
        next_latents: (B, C, h, w) x_{t-1}.
        parents: (B,) int64, the rows before this step that these ones come from; None if each is its own.
    """

    index: int
    state: State
    mean: Tensor
    std: Tensor
    next_latents: Tensor
    parents: Tensor | None = None


#: From a batch of states to the mean (B, C, h, w) and the std (B,) of the next latents.
Transition = Callable[[State], tuple[Tensor, Tensor]]

#: From a batch of states and the means (B, C, h, w) of their next latents to the rows (B,) that go on, some of them
#: perhaps several times and others not at all; or to None for all of them.
Selection = Callable[[State, Tensor], Tensor | None]


@dataclass(frozen=True)
class SamplerConfig:
    """The settings that define a denoising process, as plain JSON-able values.

    Two processes draw from the same distribution if their configs are equal.

    Attributes:
        model: a name, folder, file or hub id for :func:`dpok_gym.models.load_model`.
        model_kwargs: its further arguments; those that only change precision or files do not count for equality.
        sampler: how noise is added, see :class:`DenoisingProcess`.
        num_inference_steps: T.
        eta: amount of noise in each stochastic step.
        guidance_scale: scale of classifier-free guidance; 1 is none.
        sde_steps: the first stochastic step and the number of them; None for all.
    """

    model: str
    model_kwargs: Mapping[str, Any] = field(default_factory=dict, compare=False)
    sampler: Kernel = "ddim"
    num_inference_steps: int = 20
    eta: float = 1.0
    guidance_scale: float = 1.0
    sde_steps: tuple[int, int] | None = None
    drawing_kwargs: tuple[Any, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_kwargs", dict(self.model_kwargs))
        # A pair is a list after JSON and perhaps a tuple before; only a tuple can be hashed.
        object.__setattr__(self, "sde_steps", None if self.sde_steps is None else tuple(self.sde_steps))
        drawing = [self.model_kwargs.get(name) for name in _DRAWING_KWARGS]
        drawing = [tuple(value) if isinstance(value, list) else value for value in drawing]
        object.__setattr__(self, "drawing_kwargs", tuple(drawing))

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON can keep them."""
        settings = asdict(self)
        del settings["drawing_kwargs"]
        return settings

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SamplerConfig:
        """Reads what :meth:`to_dict` returned.

        Raises:
            ValueError: if a key is unknown.
        """
        check_names("sampler setting", settings, [field.name for field in fields(cls) if field.init])
        return cls(**settings)

    def check_equal(self, other: SamplerConfig) -> None:
        """Checks that an environment samples as an agent learned to.

        Args:
            other: the environment's settings.

        Raises:
            ValueError: if a setting differs; the message names it. If the agent's model folder does not exist any
                more, it may have moved: then only the last part of its path is compared.
        """
        known = replace(self, model=other.model) if _is_same_model(self.model, other.model) else self
        if known == other:
            return
        mine, theirs = known._compared(), other._compared()
        different = [name for name in mine if mine[name] != theirs[name]]
        details = ", ".join(f"{name} {mine[name]!r} there, {theirs[name]!r} here" for name in different)
        raise ValueError(
            f"the agent was made for another sampler ({details}); make the environment with the agent's settings"
        )

    def _compared(self) -> dict[str, Any]:
        settings = {name: value for name, value in self.to_dict().items() if name != "model_kwargs"}
        return settings | dict(zip(_DRAWING_KWARGS, self.drawing_kwargs, strict=True))


class DenoisingProcess:
    """p(x_{t-1} | x_t, z) of a model under a sampler: a Gaussian for each denoising step.

    Args:
        model: the text-to-image model.
        sampler: how noise is added: "ddim" (Song et al. 2021), or "ode" for none at all. A flow-matching model also
            knows "flow-sde", "dance-sde", "cps" and "precise", see :func:`dpok_gym.samplers.make_flow_table`, which
            says how much noise each leaves in the image.
        num_inference_steps: T, from 1 to the number of training timesteps.
        eta: amount of noise in each step, at least 0, and at most 1 for "ddim" and "cps"; 1 for "ddim" is that of the
            diffusion's posterior (DDPM). None is the sampler's usual amount, which is 1 for "ddim".
        guidance_scale: scale of classifier-free guidance (Ho & Salimans 2022), finite and at least 0; 1 is none.
        sde_steps: the first stochastic step, in [0, T), and the number of them: the others are deterministic, without a
            density, and nothing is learned from them (MixGRPO, Flow-GRPO-Fast). None makes all steps stochastic.

    Attributes:
        model: the model.
        config: the settings.
        table: the transitions, on the model's device.
        num_function_evaluations: denoiser forward passes so far, counted in images; guidance needs two for one image.
        num_gradient_evaluations: those of them that were made with a gradient, for a backward pass.

    Raises:
        ValueError: if a setting is out of range, or the model's scheduler has no such sampler.
    """

    def __init__(
        self,
        model: TextToImageModel,
        sampler: Kernel = "ddim",
        num_inference_steps: int = 20,
        eta: float | None = None,
        guidance_scale: float = 1.0,
        sde_steps: Sequence[int] | None = None,
    ) -> None:
        check_sampler(sampler, num_inference_steps, eta, guidance_scale, sde_steps)
        # It raises an error if the model has no guidance.
        is_guided = model.num_forward_passes(guidance_scale) > 1
        if model.options.get("negative_prompt") is not None and not is_guided:
            raise ValueError("a negative prompt has no effect with guidance_scale=1; use another one, usually 5 to 7.5")
        self.model = model
        eta = read_eta(sampler, eta)
        self.table = _make_table(model, sampler, num_inference_steps, eta, sde_steps).to(model.device)
        # Numbers may have come from NumPy, whose integers JSON does not know.
        window = None if sde_steps is None else (int(sde_steps[0]), int(sde_steps[1]))
        self.config = SamplerConfig(model.name, model.options, sampler, len(self.table), eta, guidance_scale, window)
        self.num_function_evaluations = self.num_gradient_evaluations = 0

    @classmethod
    def from_config(cls, config: SamplerConfig, device: str = "auto") -> DenoisingProcess:
        """Loads the model and makes the process.

        Args:
            config: the settings.
            device: "auto" (a GPU if there is one), or any torch device.

        Raises:
            ValueError: if the model was a live pipeline without a name, which cannot be loaded again; further errors as
                :func:`dpok_gym.models.load_model`.
        """
        if config.model == LIVE_PIPELINE:
            raise ValueError(
                "the model was a live diffusers pipeline without a name, which cannot be loaded again: pass an "
                "environment with model=TextToImageModel.from_pipeline(pipe)"
            )
        model = load_model(config.model, device, **config.model_kwargs)
        return cls(
            model, config.sampler, config.num_inference_steps, config.eta, config.guidance_scale, config.sde_steps
        )

    @property
    def num_inference_steps(self) -> int:
        """The number of denoising steps, T."""
        return len(self.table)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Returns what the denoiser is told about each prompt; see :meth:`TextToImageModel.encode`."""
        return self.model.encode(prompts)

    def state(self, latents: Tensor, index: int, conditioning: Conditioning) -> State:
        """Returns a batch of states that are all at the same denoising step.

        Args:
            latents: (B, C, h, w) x_t.
            index: the step, in [0, T).
            conditioning: of the B prompts.
        """
        return State(latents, torch.full((len(latents),), index, device=latents.device), conditioning)

    def predict(
        self,
        state: State,
        guidance_scale: float | None = None,
        denoiser: nn.Module | None = None,
        guidance_gradient: GuidanceGradient = "both",
    ) -> Tensor:
        """Returns the denoiser's guided output.

        Args:
            state: B states.
            guidance_scale: None for the process's own; 1 for no guidance, not even a ``true_cfg_scale``.
            denoiser: a network to use in place of the model's own.
            guidance_gradient: see :meth:`TextToImageModel.predict`.

        Returns:
            (B, C, h, w) float32.
        """
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        model = self.model.without_true_cfg() if guidance_scale == 1 else self.model
        # Counted here, because every pass of the denoiser goes through this method.
        n_passes = len(state.latents) * model.num_forward_passes(scale)
        self.num_function_evaluations += n_passes
        self.num_gradient_evaluations += n_passes * torch.is_grad_enabled()
        timesteps = self.table.timesteps[state.step]
        return model.predict(state.latents, timesteps, state.conditioning, scale, denoiser, guidance_gradient)

    def transition(
        self, state: State, denoiser: nn.Module | None = None, guidance_gradient: GuidanceGradient = "both"
    ) -> tuple[Tensor, Tensor]:
        """Returns the mean (B, C, h, w) and the std (B,) of p(x_{t-1} | x_t, z), float32.

        Args:
            state: B states.
            denoiser: a network to use in place of the model's own.
            guidance_gradient: see :meth:`TextToImageModel.predict`.
        """
        output = self.predict(state, None, denoiser, guidance_gradient)
        return self.mean_of_output(state, output), self.table.std[state.step]

    def mean_of_output(self, state: State, output: Tensor) -> Tensor:
        """Returns the mean (B, C, h, w) of p(x_{t-1} | x_t, z) for a guided output (B, C, h, w) of the denoiser."""
        return self.table.mean(state.step, state.latents, output)

    def predicted_clean(self, state: State, mean: Tensor) -> Tensor:
        """Returns the x_0 (B, C, h, w) that the denoiser predicted when this was the mean (B, C, h, w) of x_{t-1}.

        Both are linear in x_t and the denoiser's output, so this costs no call of it.
        """
        table, rows = self.table, state.step
        output = (mean - expand(table.sample_coef[rows], mean) * state.latents) / expand(table.output_coef[rows], mean)
        return expand(table.clean_sample_coef[rows], mean) * state.latents + (
            expand(table.clean_output_coef[rows], mean) * output
        )

    def denoise(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        noise: Callable[[int], Tensor],
        transition: Transition | None = None,
        first_step: int = 0,
        select: Selection | None = None,
    ) -> Iterator[DenoisingStep]:
        """Draws x_{t-1} from p(x_{t-1} | x_t, z), step by step, down to x_0.

        Args:
            latents: (B, C, h, w) x_T, or the latents before ``first_step``.
            conditioning: of the B prompts.
            noise: gives the standard normal noise (B, C, h, w) of a step.
            transition: mean and std of the next latents; None for the process's own.
            first_step: the step to begin with, in [0, T).
            select: chooses at each step, before its noise is drawn, which of the B states go on; None for all.

        Yields:
            Each step, of the states that go on; the last one has ``next_latents`` x_0.
        """
        transition = transition or self.transition
        for index in range(first_step, self.num_inference_steps):
            state = self.state(latents, index, conditioning)
            # A policy gives its own mean here; the noise and the loop are the same for all.
            mean, std = transition(state)
            parents = None if select is None else select(state, mean)
            if parents is not None:
                state, mean, std = state[parents], mean[parents], std[parents]
                conditioning = state.conditioning
            latents = diffusion.sample(mean, std, noise(index))
            yield DenoisingStep(index, state, mean, std, latents, parents)


def check_sampler(
    sampler: Kernel,
    num_inference_steps: int,
    eta: float | None,
    guidance_scale: float,
    sde_steps: Sequence[int] | None,
) -> None:
    """Checks the settings of a :class:`DenoisingProcess` as far as that needs no model.

    Raises:
        ValueError: if one is out of range.
    """
    check_choice("sampler", sampler, *KERNELS)
    check_non_negative("guidance_scale (1 is no guidance)", guidance_scale)
    eta_of_steps(read_eta(sampler, eta), check_integer("num_inference_steps", num_inference_steps), sde_steps)


def _make_table(
    model: TextToImageModel, sampler: Kernel, num_inference_steps: int, eta: float, sde_steps: Sequence[int] | None
) -> TransitionTable:
    """Builds the table of the model's kind of diffusion, which the config of its scheduler tells."""
    config = model.scheduler_config
    if is_flow_matching(config):
        return make_flow_table(
            config,
            num_inference_steps,
            sampler,
            eta,
            sde_steps,
            sigmas="trailing" if config.get("timestep_spacing") == "trailing" else None,
            sequence_length=model.sequence_length,
        )
    if sampler not in ("ddim", "ode"):
        raise ValueError(
            f"the sampler {sampler!r} is for flow-matching models, and the model {model.name!r} is not one: use 'ddim' "
            "or 'ode'"
        )
    return make_ddim_table(config, num_inference_steps, eta, sde_steps)


def _is_same_model(known: str, other: str) -> bool:
    """Returns whether two names are of one model, whose folder may have moved."""
    if os.path.exists(known):
        return os.path.realpath(known) == os.path.realpath(other)
    if not os.path.isabs(known):
        return known == other  # a hub id looks like a relative path, and its last part does not tell the model
    # Without normpath, two folders written with a slash at the end would both have the name "".
    return os.path.basename(os.path.normpath(known)) == os.path.basename(os.path.normpath(other))
