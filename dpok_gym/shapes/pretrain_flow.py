"""Pre-trains the embedded flow-matching model from nothing: ``python -m dpok_gym.shapes.pretrain_flow``.

It is a small Stable Diffusion 3: a transformer of image and text tokens (MMDiT) and two text encoders, without T5. They
learn together, with the flow-matching loss, in the latents of the embedded autoencoder, which stays as it is. The
scenes and the captions, some of them wrong, are those of :mod:`dpok_gym.shapes.pretrain`. The denoiser has 3.6 million
parameters; 22,000 steps of 64 images take about two hours on one core.

The shipped weights differ in one point from what this script makes: the learning rate fell as if towards zero at step
12,000 until step 3,000, at 16,000 until 8,000, and at 30,000 until 17,500.

An interrupted run continues where it stopped, if started with the same ``--work``: this folder keeps the log and the
checkpoints.

Letters used for shapes: B images or captions in a batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dpok_gym.models.repeated_token import RepeatedTokenProcessor
from dpok_gym.models.stable_diffusion_3 import T5_TOKENS
from dpok_gym.shapes import FLOW_WEIGHTS, WEIGHTS
from dpok_gym.shapes.pretrain import BATCH, TEXT_WIDTH, draw_examples, encode_scenes, make_text_config
from dpok_gym.shapes.saving import save_pipeline
from dpok_gym.shapes.scenes import IMAGE_SIZE
from dpok_gym.shapes.training import minimise

STEPS, LEARNING_RATE = 22_000, 2e-3
EMA_DECAY = 0.999


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Returns an untrained text encoder: a small CLIP text tower. The denoiser reads its last layer but one."""
    return CLIPTextModelWithProjection(make_text_config(tokenizer, projection_dim=TEXT_WIDTH))


def make_transformer() -> SD3Transformer2DModel:
    """Returns the untrained denoiser of 4x8x8 latents: 4 blocks of width 160, which read 16 patches of 2x2."""
    size, patch_size, heads, width = IMAGE_SIZE // 8, 2, 5, 160
    return SD3Transformer2DModel(
        sample_size=size,
        patch_size=patch_size,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=size // patch_size,
        qk_norm="rms_norm",
    )


def encode_texts(modules: nn.ModuleDict, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what the transformer is told: its tokens (B, L + 1, 2F), and the pooled texts (B, 2F).

    Args:
        modules: with both text encoders.
        tokens: (B, L) int64.
    """
    both = [modules[name](tokens, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    hidden = torch.cat([output.hidden_states[-2] for output in both], dim=-1)
    pooled = torch.cat([output.text_embeds for output in both], dim=-1)
    # One row of zeros stands for those that T5 would fill.
    return nn.functional.pad(hidden, (0, 0, 0, 1)), pooled


def train(folder: Path, steps: int = STEPS) -> StableDiffusion3Pipeline:
    """Trains the denoiser and both text encoders, on latents and captions of which some are wrong."""
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)  # the pipeline wants a number
    latents, requests = encode_scenes(vae, folder)
    latents = latents * vae.config.scaling_factor
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    modules = nn.ModuleDict(
        {
            "transformer": make_transformer(),
            "text_encoder": make_text_encoder(tokenizer),
            "text_encoder_2": make_text_encoder(tokenizer),
        }
    )
    modules["transformer"].set_attn_processor(RepeatedTokenProcessor())  # type: ignore[operator]

    def loss(step: int) -> Tensor:
        clean, texts, generator = draw_examples(latents, requests, step)
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = torch.rand(BATCH, generator=generator)
        noisy = torch.lerp(clean, noise, sigmas[:, None, None, None])
        tokens = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        hidden, pooled = encode_texts(modules, tokens)
        velocity = modules["transformer"](
            noisy, hidden, pooled, 1000 * sigmas, joint_attention_kwargs={"num_repeats": T5_TOKENS}
        ).sample
        return (velocity - (noise - clean)).square().mean()

    averaged = minimise("flow", modules, loss, steps, LEARNING_RATE, folder, EMA_DECAY)
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=averaged["text_encoder"],
        text_encoder_2=averaged["text_encoder_2"],
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=averaged["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


def main(arguments: Iterable[str] | None = None) -> None:
    """Trains the model, or continues where an interrupted run stopped, and writes the pipeline's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("pretraining"), help="folder of checkpoints and log")
    parser.add_argument("--out", type=Path, default=FLOW_WEIGHTS, help="folder of the finished pipeline")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_pipeline(train(options.work), options.out)


if __name__ == "__main__":
    main()
