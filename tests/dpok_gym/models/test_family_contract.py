"""What holds for every family of models, each with its small pipeline, against diffusers' own pipeline."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
)
from huggingface_hub import constants
from peft import PeftModel
from torch import Tensor, nn

from agents import DenoisingPolicy
from dpok_gym import DenoisingVectorEnv, diffusion
from dpok_gym.models import TextToImageModel, load_model
from dpok_gym.models.base import GuidanceGradient
from dpok_gym.models.lora import LoRA, reference_copy
from dpok_gym.models.lora_files import write_peft
from dpok_gym.models.scheduler_configs import is_flow_matching
from dpok_gym.samplers.process import DenoisingProcess, State
from dpok_gym.testing import TINY_FAMILIES
from tests.support import assert_same, redness

PROMPTS = ["a green rabbit.", "dog"]
T = 3


def load_lora_weights(pipeline: Any, model: TextToImageModel, lora: LoRA, folder: Path) -> None:
    assert model.loads_lora_files
    lora.save(folder, model.lora_prefix)
    pipeline.load_lora_weights(folder)


def load_with_peft(pipeline: Any, model: TextToImageModel, lora: LoRA, folder: Path) -> None:
    """The way into a pipeline that has no ``load_lora_weights``."""
    assert not model.loads_lora_files
    write_peft(lora.state_dict(), folder, None, {})
    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, folder).merge_and_unload()


@dataclass(frozen=True)
class Family:
    """What tells a small pipeline from the others.

    Attributes:
        scale: a guidance scale that its denoiser takes; 1 if it takes none.
        size: the height and width of its images in these tests; None for its own.
        other_size: another height and width.
        guidance: the arguments of the pipeline's call for a guidance scale.
        call: further arguments of the pipeline's call.
        missing: parts that it comes without; diffusers has to be told so.
        for_pipeline: from latents (B, C, h, w) to what the pipeline takes.
        negative: arguments of ``load_model`` with which a negative prompt has an effect, and those of the pipeline.
        negative_call: from the pipeline and negative prompts to the arguments that tell it of them.
        normalize: from the autoencoder and its latents to those that the denoiser reads.
        ddim: what the config of a DDIM scheduler in the pipeline has differently.
        add_lora: adds a LoRA of a model to the pipeline, by way of a file in a folder.
    """

    scale: float = 5.0
    size: tuple[int, int] | None = None
    other_size: tuple[int, int] = (16, 32)
    guidance: Callable[[float], Mapping[str, Any]] = lambda scale: {"guidance_scale": scale}
    call: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    for_pipeline: Callable[[Tensor], Tensor] = lambda latents: latents
    negative: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})
    negative_call: Callable[[Any, list[str]], Mapping[str, Any]] = lambda _, prompts: {"negative_prompt": prompts}
    normalize: Callable[[Any, Tensor], Tensor] = lambda vae, latents: (
        (latents - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor
    )
    ddim: Mapping[str, Any] = field(default_factory=dict)
    add_lora: Callable[[Any, TextToImageModel, LoRA, Path], None] = load_lora_weights


def pack(latents: Tensor) -> Tensor:
    """Returns latents as FLUX.1's pipeline takes them."""
    batch, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, batch, channels, height, width)


_FLUX: dict[str, Any] = {
    "size": (16, 16),
    "for_pipeline": pack,
    "negative": ({"true_cfg_scale": 3.0}, {"true_cfg_scale": 3.0}),
}

FAMILIES: dict[str, Family] = {
    "stable-diffusion": Family(),
    "stable-diffusion-v": Family(),
    "stable-diffusion-xl": Family(),
    "stable-diffusion-3": Family(),
    "stable-diffusion-3-no-t5": Family(missing=("text_encoder_3", "tokenizer_3")),
    "flux-dev": Family(scale=3.5, **_FLUX),
    "flux-schnell": Family(scale=1.0, **_FLUX),
    "flux2-klein": Family(
        size=(16, 16),
        negative_call=lambda pipeline, prompts: {"negative_prompt_embeds": pipeline.encode_prompt(prompts)[0]},
        normalize=lambda vae, latents: vae.bn(Flux2KleinPipeline._patchify_latents(latents)),
    ),
    "pixart-sigma": Family(
        call={"use_resolution_binning": False, "clean_caption": False},
        ddim={"timestep_spacing": "trailing"},
        add_lora=load_with_peft,
    ),
    "sana": Family(other_size=(32, 64), call={"use_resolution_binning": False}),
}


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def family(name: str) -> Family:
    return FAMILIES[name]


@pytest.fixture
def folder(name: str, tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder(name)


@pytest.fixture
def load(folder: Path, family: Family) -> Callable[..., Any]:
    """Loads the model, of the size for these tests."""
    return lambda **options: load_model(folder, "cpu", **({"image_size": family.size} | options))


@pytest.fixture
def make(load: Callable[..., Any], family: Family) -> Callable[..., DenoisingProcess]:
    """Makes a process with guidance, whose sampler is that of diffusers, of a model with these options."""

    def make(guidance_scale: float = family.scale, num_inference_steps: int = T, **options: Any) -> DenoisingProcess:
        return process_of(load(**options), guidance_scale, num_inference_steps)

    return make


def process_of(model: TextToImageModel, guidance_scale: float, num_inference_steps: int = T) -> DenoisingProcess:
    sampler: Any = "ode" if is_flow_matching(model.scheduler_config) else "ddim"
    return DenoisingProcess(model, sampler, num_inference_steps, guidance_scale=guidance_scale)


def x_T(model: TextToImageModel) -> Tensor:
    return torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def draw(process: DenoisingProcess) -> Tensor:
    """Draws the prompts with our sampler, with the noise that diffusers' pipelines take."""
    generator = torch.Generator().manual_seed(5)
    latents = x_T(process.model)
    noise = lambda _: torch.randn(latents.shape, generator=generator)  # noqa: E731
    steps = list(process.denoise(latents, process.encode(PROMPTS), noise))
    return process.model.decode(steps[-1].next_latents)


def plain_pipeline(folder: Path, family: Family, **options: Any) -> Any:
    """Loads a folder with diffusers alone."""
    return DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(family.missing), **options)


def draw_with_diffusers(
    pipeline: Any, family: Family, model: TextToImageModel, guidance_scale: float, **call: Any
) -> Tensor:
    """Draws the same with a pipeline: with Euler's steps if it was trained with flow matching, else with DDIM's."""
    own = pipeline.scheduler
    if not is_flow_matching(dict(own.config) | {"_class_name": type(own).__name__}):
        pipeline.scheduler = DDIMScheduler.from_config(own.config, clip_sample=False, **family.ddim)
        call |= {"eta": 1.0}
    elif not isinstance(own, FlowMatchEulerDiscreteScheduler):  # a solver that finds other noise levels by itself
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=own.config.flow_shift)
        call |= {"sigmas": [1 - step / T for step in range(T)]}
    pipeline.set_progress_bar_config(disable=True)
    height, width = model.image_shape
    images = pipeline(
        prompt=PROMPTS,
        height=height,
        width=width,
        latents=family.for_pipeline(x_T(model)),
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=T,
        output_type="pt",
        **{**family.guidance(guidance_scale), **family.call, **call},
    ).images
    pipeline.scheduler = own
    return images


def make_lora(model: TextToImageModel, scale: float = 0.3, layers: str = "attention") -> LoRA:
    """A LoRA that changes something, as after training."""
    lora = LoRA(model.denoiser, 2, model.lora_layers[layers])
    with torch.no_grad():
        for value in lora.parameters.values():
            value.normal_(std=scale)
    return lora


def networks(pipeline: Any) -> dict[str, nn.Module]:
    return {part: module for part, module in pipeline.components.items() if isinstance(module, nn.Module)}


def assert_same_images(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_every_small_pipeline_keeps_the_contract() -> None:
    assert FAMILIES.keys() == TINY_FAMILIES.keys()


# --- Ways to a model


@pytest.mark.slow
def test_a_folder_a_hub_id_and_a_live_pipeline_are_one_model(
    name: str,
    folder: Path,
    family: Family,
    make: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = make()
    repository = tmp_path / f"models--someone--{name}"  # as in the cache of the hub
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pipeline = plain_pipeline(folder, family)
    live: Any = TextToImageModel.from_pipeline(pipeline, image_size=family.size)
    hub: Any = load_model(f"someone/{name}", "cpu", image_size=family.size)
    assert live.denoiser is getattr(pipeline, live.denoiser_part)
    expected = draw(process)
    for model in (hub, live):
        assert type(model) is type(process.model)
        assert (model.latent_shape, model.image_shape) == (process.model.latent_shape, process.model.image_shape)
        assert model.text_width == process.model.text_width
        assert_same(dict(model.scheduler_config), dict(process.model.scheduler_config))
        assert_same(draw(process_of(model, family.scale)), expected)


@pytest.mark.slow
def test_a_missing_text_encoder(folder: Path, family: Family, load: Callable[..., Any], tmp_path: Path) -> None:
    encoders = [part for part in load().text_encoders if part not in family.missing]
    for part in encoders:
        copied = Path(shutil.copytree(folder, tmp_path / part))
        shutil.rmtree(copied / part)
        with pytest.raises(ValueError, match=rf"cannot be loaded: its {part}: there is no folder .*{part}"):
            load_model(copied, "cpu")
        index = json.loads((copied / "model_index.json").read_text())
        (copied / "model_index.json").write_text(json.dumps(index | {part: [None, None]}))
        with pytest.raises(ValueError, match=rf"cannot be loaded: .*{part}"):
            load_model(copied, "cpu")
        pipeline = plain_pipeline(folder, family)
        setattr(pipeline, part, None)
        with pytest.raises(ValueError, match=rf"{part}\b"):
            TextToImageModel.from_pipeline(pipeline)


# --- The images are those of the pipeline


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_the_process_draws_the_image_of_the_pipeline(
    folder: Path, family: Family, make: Callable[..., Any], guided: bool
) -> None:
    scale = family.scale if guided else 1.0
    process = make(scale)
    theirs = draw_with_diffusers(plain_pipeline(folder, family), family, process.model, scale)
    assert_same_images(draw(process), theirs)
    if scale != 1:
        assert not torch.allclose(theirs, draw(make(1.0)), atol=1e-4)


@pytest.mark.slow
def test_other_sizes_of_images(folder: Path, family: Family, make: Callable[..., Any]) -> None:
    process = make(image_size=family.other_size)
    assert process.model.image_shape == family.other_size
    theirs = draw_with_diffusers(plain_pipeline(folder, family), family, process.model, family.scale)
    assert theirs.shape == (len(PROMPTS), 3, *family.other_size)
    assert_same_images(draw(process), theirs)


def test_sizes_that_the_denoiser_cannot_draw(load: Callable[..., Any]) -> None:
    model = load()
    factor, most = model.size_factor, model.max_side
    sizes: list[Any] = [0, -factor, factor + factor // 2, (factor, factor + 1), most + factor, float(factor)]
    for size in [*sizes, (factor, factor, factor), (factor,), str(factor), ("a", "b"), (factor, True)]:
        message = f"multiples of {factor} pixels, got {size!r}; at most {most}"
        with pytest.raises(ValueError, match=re.escape(message)):
            load(image_size=size)
    assert load(image_size=factor * (most // factor)).image_shape[0] <= most


@pytest.mark.slow
@pytest.mark.parametrize("negative_prompt", ["", "a dog"])
def test_negative_prompts(folder: Path, family: Family, make: Callable[..., Any], negative_prompt: str) -> None:
    options, call = family.negative
    process = make(negative_prompt=negative_prompt, **options)
    ours = draw(process)
    pipeline = plain_pipeline(folder, family)
    with torch.no_grad():
        negative = {**family.negative_call(pipeline, [negative_prompt] * len(PROMPTS)), **call}
    theirs = draw_with_diffusers(pipeline, family, process.model, family.scale, **negative)
    assert_same_images(ours, theirs)
    if negative_prompt:
        assert not torch.allclose(ours, draw(make(**options)), atol=1e-4)


def test_sizes_and_negative_prompts_share_the_networks(load: Callable[..., Any], family: Family, folder: Path) -> None:
    size, options = max(family.other_size), family.negative[0]
    plain, other = load_model(folder, "cpu"), load(image_size=size, negative_prompt="dog", **options)
    assert plain.denoiser is other.denoiser
    assert (plain.options, other.options) == ({}, {"image_size": size, "negative_prompt": "dog", **options})
    assert load_model(folder, "cpu", **other.options) is other


def test_latents_of_images(folder: Path, family: Family, load: Callable[..., Any]) -> None:
    model = load()
    images = torch.rand(2, 3, *model.image_shape)
    vae: Any = plain_pipeline(folder, family).vae
    with torch.no_grad():
        latents = model.encode_images(images)
        encoded = vae.encode(2 * images - 1)
        decoded = model.decode(latents)
    unscaled = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mean
    expected = family.normalize(vae, unscaled)
    assert latents.shape == (2, *model.latent_shape)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        theirs = (vae.decode(unscaled).sample / 2 + 0.5).clamp(0, 1)
    assert_same_images(decoded, theirs)
    with pytest.raises(ValueError, match="the images must have the shape"):
        model.encode_images(images[:, :2])


# --- LoRA, copies and pipelines


@pytest.mark.slow
def test_a_lora_draws_the_same_images_with_diffusers(
    folder: Path, family: Family, make: Callable[..., Any], tmp_path: Path
) -> None:
    process = make()
    before, lora = draw(process), make_lora(process.model, layers="all")
    with lora.enabled():
        ours = draw(process)
    pipeline = plain_pipeline(folder, family)
    family.add_lora(pipeline, process.model, lora, tmp_path)
    assert_same_images(ours, draw_with_diffusers(pipeline, family, process.model, family.scale))
    assert not torch.allclose(ours, before, atol=1e-3)
    assert_same(draw(process), before)  # it is off again


@pytest.mark.slow
def test_a_pipeline_of_the_model(
    folder: Path, family: Family, make: Callable[..., Any], fresh_models: Callable[[], None]
) -> None:
    process = make()
    model: Any = process.model
    model.offload_text_encoder()
    pipeline = model.to_pipeline()
    assert type(pipeline) is type(plain_pipeline(folder, family))
    parts = networks(pipeline)
    assert all(part is getattr(model, key, model.denoiser) for key, part in parts.items())
    assert {part.device for part in parts.values()} == {model.device}
    before = draw(process)
    assert_same_images(before, draw_with_diffusers(pipeline, family, model, family.scale))
    again = TextToImageModel.from_pipeline(pipeline, image_size=family.size)
    assert_same(draw(process_of(again, family.scale)), before)


@pytest.mark.slow
def test_a_pipeline_of_another_denoiser(
    family: Family, make: Callable[..., Any], tmp_path: Path, fresh_models: Callable[[], None]
) -> None:
    process = make()
    model: Any = process.model
    before, lora = draw(process), make_lora(model)
    with lora.enabled():
        trained = draw(process)
    assert not torch.allclose(trained, before, atol=1e-3)
    pipeline = model.to_pipeline(lora.merged_copy())
    assert_same_images(trained, draw_with_diffusers(pipeline, family, model, family.scale))
    pipeline.save_pretrained(tmp_path / "merged")
    saved = load_model(tmp_path / "merged", "cpu", image_size=family.size)
    assert_same_images(trained, draw(process_of(saved, family.scale)))

    # The model's own pipeline has no trace of the LoRA, whose layers are in the network, and copies no weights.
    plain = getattr(model.to_pipeline(), model.denoiser_part)
    assert not any("lora" in key for key, _ in plain.named_parameters())
    own = {value.data_ptr() for value in model.denoiser.parameters()}
    assert {value.data_ptr() for value in plain.parameters()} <= own
    with lora.enabled():
        assert_same_images(before, draw_with_diffusers(model.to_pipeline(), family, model, family.scale))


def test_layers_of_a_lora(load: Callable[..., Any]) -> None:
    """In every block, all projections of attention; or all layers but those of norms and those with groups."""
    model = load()
    if model.denoiser_part == "unet":
        pytest.skip("a UNet has layers of other kinds")
    network = reference_copy(model.denoiser)
    layers = set()
    for layer, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and getattr(module, "groups", 1) == 1:
            layers.add(layer)
    layers = {layer for layer in layers if "blocks." in layer and "norm" not in layer}
    layers.discard("transformer_blocks.1.attn.add_q_proj")  # of Stable Diffusion 3's last block: nothing reads it
    expected = {"attention": {layer for layer in layers if ".attn" in layer}, "all": layers}
    assert model.lora_layers.keys() == expected.keys()
    for kind, endings in model.lora_layers.items():
        lora = LoRA(reference_copy(network), 2, endings)
        changed = {key.partition(".lora_")[0] for key in lora.parameters}
        assert {layer for layer in changed if "blocks." in layer} == expected[kind], kind


Gradients = tuple[Tensor, list[Tensor]]


def gradients(
    process: DenoisingProcess, trained: LoRA | nn.Module, guidance_gradient: GuidanceGradient = "both"
) -> Gradients:
    """Returns the denoiser's guided output, and the gradient of a function of it by the trained parameters."""
    block: AbstractContextManager[None]
    if isinstance(trained, LoRA):
        parameters, denoiser, block = list(trained.parameters.values()), None, trained.enabled()
    else:
        parameters, denoiser, block = list(trained.parameters()), trained, nullcontext()
    state = State(x_T(process.model), torch.tensor([0, T - 1]), process.encode(PROMPTS))
    with block:
        output = process.predict(state, denoiser=denoiser, guidance_gradient=guidance_gradient)
        output.square().mean().backward()
    values = [value.grad.clone() for value in parameters if value.grad is not None]
    for value in parameters:
        value.grad = None
    return output.detach(), values


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_every_part_of_a_lora_learns(make: Callable[..., Any], layers: str) -> None:
    """The images must depend on each of the chosen layers."""
    process = make()
    lora = make_lora(process.model, layers=layers)
    _, values = gradients(process, lora)
    assert len(values) == len(lora.parameters)
    assert all(value.any() for value in values)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_gradient_checkpointing_changes_only_what_is_kept(
    make: Callable[..., Any], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = make()
    trained: Any = reference_copy(process.model.denoiser).requires_grad_(True) if whole else make_lora(process.model)
    output, expected = gradients(process, trained)
    network: Any = trained if whole else process.model.denoiser
    network.enable_gradient_checkpointing()
    calls = []
    for module in network.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            function = module._gradient_checkpointing_func
            monkeypatch.setattr(
                module, "_gradient_checkpointing_func", lambda *args, f=function: calls.append(1) or f(*args)
            )
    try:
        same_output, values = gradients(process, trained)
        assert calls
        calls.clear()
        draw(process)
        assert not calls
    finally:
        network.disable_gradient_checkpointing()
    torch.testing.assert_close(same_output, output)
    assert len(values) == len(expected) > 0
    for ours, theirs in zip(values, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_copy_that_is_made_of_the_config(make: Callable[..., Any]) -> None:
    """As when a denoiser is spread over several GPUs and trained as a whole."""
    process = make()
    original: Any = process.model.denoiser
    copied = type(original).from_config(original.config).eval()
    copied.load_state_dict(reference_copy(original).state_dict())
    state = State(x_T(process.model), torch.tensor([0, T - 1]), process.encode(PROMPTS))
    with torch.no_grad():
        assert_same_images(process.predict(state, denoiser=copied), process.predict(state))


@pytest.mark.slow
def test_gradient_of_the_conditional_part_alone(make: Callable[..., Any], family: Family) -> None:
    process = make(**family.negative[0])
    if process.model.num_forward_passes(family.scale) == 1:
        pytest.skip("its guidance costs no second pass")
    lora = make_lora(process.model, 0.1)
    output, both = gradients(process, lora)
    same_output, conditional = gradients(process, lora, "conditional")
    # A batch of another size adds up in another order, and guidance magnifies the difference.
    torch.testing.assert_close(same_output, output, rtol=1e-4, atol=1e-4)
    assert any(not torch.allclose(ours, theirs, rtol=0.01) for ours, theirs in zip(conditional, both, strict=True))
    if process.model.num_forward_passes(1.0) == 1:
        # output = (1 - s) unconditional + s conditional: with s = 1 nothing is left of the first.
        _, expected = gradients(make(1.0), lora)
        for ours, theirs in zip(gradients(make(1 + 1e-7), lora, "conditional")[1], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_number_of_forward_passes(load: Callable[..., Any], family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, family.negative[0]):
        model = load(**options)
        rows: list[int] = []
        plain = model._denoise
        with monkeypatch.context() as patched:
            patched.setattr(model, "_denoise", lambda *args, f=plain, n=rows: n.append(len(args[1])) or f(*args))
            conditioning = model.encode(PROMPTS)
            for scale in (1.0, family.scale):
                for guidance_gradient in ("both", "conditional"):
                    rows.clear()
                    model.predict(x_T(model), torch.tensor([1.0, 501.0]), conditioning, scale, None, guidance_gradient)
                    assert sum(rows) == len(PROMPTS) * model.num_forward_passes(scale)


# --- Half precision


@pytest.mark.slow
def test_bfloat16_through_the_policy(make: Callable[..., Any]) -> None:
    """The first ratio is exactly 1 and the first KL exactly 0, with gradients and without."""
    process = make(dtype="bfloat16")
    assert process.model.dtype == torch.bfloat16
    process = DenoisingProcess(process.model, "ddim", T, guidance_scale=process.config.guidance_scale)
    env = DenoisingVectorEnv(1, model=process.model, prompts=PROMPTS, reward=redness, num_inference_steps=T)
    spaces = env.single_observation_space, env.single_action_space
    policy = DenoisingPolicy(*spaces, lambda _: 1e-2, process=process, lora_rank=2)
    assert {value.dtype for value in policy.denoiser_parameters()} == {torch.float32}
    state = State(x_T(process.model), torch.tensor([0, T - 2]), process.encode(PROMPTS))
    mean, std = policy.transition(state)
    assert mean.dtype == torch.float32
    reference, _ = policy.reference_transition(state)
    assert diffusion.kl_divergence(mean, reference, std).tolist() == [0.0, 0.0]
    with torch.no_grad():
        for value in policy.denoiser_parameters():
            value.normal_(std=0.1)
        old, _ = policy.transition(state)  # as when the images were drawn
    new, _ = policy.transition(state)
    assert diffusion.log_ratio(torch.randn_like(old), new, old, std).exp().tolist() == [1.0, 1.0]
    assert (diffusion.kl_divergence(new, reference, std) > 0).all()
    new.sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in policy.denoiser_parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_images_in_half_precision_are_nearly_the_same(make: Callable[..., Any], dtype: str) -> None:
    process = make(dtype=dtype)
    assert process.model.dtype == getattr(torch, dtype)
    torch.testing.assert_close(draw(process), draw(make()), rtol=0.1, atol=0.1)


# --- Text encoders


def moved(model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Returns, by text encoder, where it was moved to from now on."""
    places: dict[str, list[str]] = {}
    for part in model.text_encoders:
        if (encoder := getattr(model, part)) is not None:
            places[part] = []
            move = lambda where, e=encoder, p=places[part]: p.append(str(where)) or e  # noqa: E731
            monkeypatch.setattr(encoder, "to", move)
    return places


def test_text_encoders_are_offloaded_and_come_back(
    load: Callable[..., Any], family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(negative_prompt="a rabbit", **family.negative[0])
    expected = model.encode(["a dog"])
    places = moved(model, monkeypatch)
    model.offload_text_encoder()
    assert places
    assert all(where[-1:] == ["cpu"] for where in places.values())
    # What guidance and known prompts need was kept.
    with monkeypatch.context() as patched:
        patched.delattr(type(model), "_encode")
        model.predict(x_T(model)[:1], torch.tensor([1.0]), model.encode(["a dog"]), family.scale)
    # On a device of another kind they would have to be moved there.
    model._conditioning.clear()
    for where in places.values():
        where.clear()
    assert_same(model.encode(["a dog"]), expected)
    assert all(where for where in places.values())


def test_offloaded_text_encoders_are_on_the_device_only_while_they_read(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(negative_prompt=None)
    model._conditioning.clear()  # other tests may have encoded these prompts
    places = moved(model, monkeypatch)
    for part in places:  # they seem to be elsewhere
        monkeypatch.setattr(getattr(model, part), "parameters", lambda: iter([torch.empty(0, device="meta")]))
    model.encode(["a dog"])
    assert all(where == ["cpu"] for where in places.values())  # the model's own device
    model.offload_text_encoder()
    for where in places.values():
        where.clear()
    model.encode(["a dog", "moon", "a rabbit"])
    assert all(where == ["cpu"] * 3 for where in places.values())  # twice to read, and then away
    model._unconditional = None  # as with another negative prompt
    model._conditioning.clear()
    for where in places.values():
        where.clear()
    model.unconditional()
    assert all(len(where) > 1 for where in places.values())
    for where in places.values():
        where.clear()
    model.to_pipeline()
    model.encode(["a red dog"])
    assert all(where == ["cpu"] * 2 for where in places.values())  # not away from a pipeline


def test_prompts_are_encoded_in_the_precision_of_the_weights(load: Callable[..., Any], family: Family) -> None:
    """Whoever asks first: they are kept, and a learner's autocast is nobody else's."""
    model = load(negative_prompt="a red dog", **family.negative[0])
    model._conditioning.clear()
    with torch.autocast("cpu", torch.bfloat16):
        first = model.encode(["a green dog"])
    model._conditioning.clear()
    assert_same(first, model.encode(["a green dog"]))


@pytest.mark.slow
def test_guidance_after_the_first_use_in_inference_mode(make: Callable[..., Any], family: Family) -> None:
    """The encoded negative prompt is kept: an inference tensor could not take part in a backward pass."""
    process = make(negative_prompt="a green moon", **family.negative[0])
    model: Any = process.model
    model._unconditional = None
    model._conditioning.clear()
    with torch.inference_mode():
        draw(process)
    assert not any(value.is_inference() for value in model.unconditional().values())
    assert all(value.isfinite().all() for value in gradients(process, make_lora(model))[1])


@pytest.mark.slow
def test_many_prompts_are_encoded_as_each_of_them(load: Callable[..., Any]) -> None:
    model = load()
    prompts: Sequence[str] = [f"{letter} moon {letter * n}." for letter in "xyz" for n in (1, 7)]
    together = model.encode(prompts)
    model._conditioning.clear()
    for k in (0, 1, len(prompts) - 1):
        for key, values in model.encode(prompts[k : k + 1]).items():
            assert torch.equal(values[0], together[key][k])  # bit for bit, whatever was encoded beside it


def test_prompts_that_are_too_long(load: Callable[..., Any]) -> None:
    model = load()
    part, most = max(model._readers().items(), key=lambda reader: reader[1])
    (n_around,) = model._count_tokens(getattr(model, part), [""])  # start and end, or a whole chat
    short, long = " dog" * (most - n_around), " dog" * (most + 1)
    model.check_prompts([short])
    assert [index for index, _ in model.find_long([short, long, "dog"])] == [1]
    with pytest.raises(ValueError, match=rf"reads at most {most}.*shorten it"):
        model.encode([long])
    cut = load(long_prompts="truncate").encode([long])
    assert all(value.isfinite().all() for value in cut.values())


def test_an_environment_of_the_family(folder: Path, family: Family) -> None:
    settings: dict[str, Any] = {"prompts": PROMPTS, "reward": redness, "num_inference_steps": 2, "device": "cpu"}
    env = DenoisingVectorEnv(2, model=str(folder), image_size=family.size, guidance_scale=family.scale, **settings)
    env.reset(seed=3)
    for _ in range(2):
        _, reward, terminated, _, _ = env.step(env.action_space.sample())
    assert terminated.all()
    assert torch.from_numpy(reward).isfinite().all()
