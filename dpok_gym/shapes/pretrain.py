"""Pre-trains the embedded model from nothing: ``python -m dpok_gym.shapes.pretrain``.

First the autoencoder learns random scenes (0.94 M parameters, 4,400 steps of 32 images). Then the denoiser and the text
encoder together learn captioned scenes, in its latents (2.5 M parameters, 14,000 steps of 64). On two cores this takes
about 35 and 60 minutes. An interrupted run continues where it stopped, if started with the same ``--work``: this folder
keeps the log and the checkpoints.

The shipped weights differ in one point from what this script makes: in the first 1,000 steps of the autoencoder the
learning rate fell towards zero at step 5,000 instead of 4,400.

Letters used for shapes: B images or captions in a batch, N scenes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dpok_gym.shapes import WEIGHTS
from dpok_gym.shapes.captions import WORDS, Request, corrupt, sample_requested_scenes
from dpok_gym.shapes.saving import save_pipeline
from dpok_gym.shapes.scenes import IMAGE_SIZE, render, sample_scenes
from dpok_gym.shapes.training import minimise, seeded_generator
from dpok_gym.utils.files import replacing

VAE_STEPS, VAE_BATCH, VAE_LEARNING_RATE = 4400, 32, 3e-3
VAE_KL_WEIGHT = 2e-6  # of the KL summed over the 256 latent dimensions, as in latent diffusion

UNET_STEPS, UNET_LEARNING_RATE = 14_000, 1.5e-3
UNET_EMA_DECAY = 0.999

BATCH = 64
SCENES = 80_000  # encoded once; the noise and the corrupted captions are drawn anew at every step
CATEGORY_SHARES = (1, 2, 2, 3)  # colour, count, composition, location: harder categories get more examples
#: Share of the training captions that have one attribute wrong. They make the model follow prompts badly, so that there
#: is something for reinforcement learning to improve.
CORRUPTED_CAPTIONS = 0.15
EMPTY_CAPTIONS = 0.1  # share of the training captions that are left out, for classifier-free guidance
SNR_CAP = 5.0  # steps with little noise to remove weigh less, as in min-SNR weighting (Hang et al. 2023)

MAX_TOKENS, TEXT_WIDTH = 16, 64


def make_vae() -> AutoencoderKL:
    """Returns the untrained autoencoder: 3x64x64 images to 4x8x8 latents, 0.94 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def vae_loss(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Returns the reconstruction error plus a slight pull of the latents towards N(0, I); a scalar.

    Args:
        vae: the autoencoder.
        images: (B, 3, 64, 64) in [-1, 1].
    """
    with torch.autocast(images.device.type, torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
    error = reconstruction.float() - images
    return error.abs().mean() + 2 * error.square().mean() + VAE_KL_WEIGHT * posterior.kl().mean()


def train_vae(folder: Path, steps: int = VAE_STEPS) -> AutoencoderKL:
    """Trains the autoencoder on random scenes, with a new batch at each step."""
    vae = make_vae()

    def loss(step: int) -> Tensor:
        return vae_loss(vae, 2 * render(sample_scenes(VAE_BATCH, seeded_generator(step))) - 1)

    minimise("vae", nn.ModuleDict({"vae": vae}), loss, steps, VAE_LEARNING_RATE, folder)
    return vae


def make_tokenizer() -> CLIPTokenizer:
    """Returns a CLIP tokenizer for which each word of the captions is one token.

    The words are also written into its configuration, so that a prompt with another word can be refused. Byte-pair
    encoding would read such a word as single letters, which the text encoder has never seen.
    """
    return train_clip_tokenizer(WORDS, MAX_TOKENS, words=list(WORDS))


def train_clip_tokenizer(texts: Iterable[str], max_tokens: int, **config: Any) -> CLIPTokenizer:
    """Trains a byte-pair encoding, and returns it as a CLIP tokenizer.

    Args:
        texts: what the encoding is trained on.
        max_tokens: most tokens of a prompt, start and end included.
        **config: further entries of the tokenizer's configuration.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(special_tokens=special, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=max_tokens, **config)


def make_text_config(tokenizer: CLIPTokenizer, **further: Any) -> CLIPTextConfig:
    """Returns the config of a small CLIP text tower of two layers, with further entries."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **further,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Returns the untrained text encoder."""
    return CLIPTextModel(make_text_config(tokenizer))


def make_unet() -> UNet2DConditionModel:
    """Returns the untrained denoiser of 4x8x8 latents, 2.4 M parameters.

    The prompt reaches it in two ways. Cross-attention at both resolutions reads the words. The pooled prompt is added
    to the timestep's embedding, a short path for what concerns the whole image: the number and kinds of the objects.
    """
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # in diffusers this is the number of heads
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def make_scheduler() -> DDIMScheduler:
    """Returns DDIM with Stable Diffusion's noise schedule, for a network that predicts v as Stable Diffusion 2 does.

    The noisiest steps decide what the image shows. There an error in v is an error in the clean latent. The noise
    itself is nearly known there, so a network that predicted it would learn little from these steps.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, folder: Path) -> tuple[Tensor, list[Request]]:
    """Encodes the training scenes, or reads their latents from an earlier run.

    Returns:
        The latents (N, 4, 8, 8), not yet scaled, of the N = ``SCENES`` scenes, and their true captions.
    """
    cache, latents, requests = folder / "latents.pt", [], []
    # The scenes and captions are drawn again in any case: that is fast, and only the encoding is slow.
    stored = torch.load(cache) if cache.exists() else None
    for first in range(0, SCENES, 500):
        scenes, true = sample_requested_scenes(500, torch.Generator().manual_seed(first), CATEGORY_SHARES)
        requests += true
        if stored is None:
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(vae.encode(2 * render(scenes) - 1).latent_dist.mean.float())
    if stored is None:
        stored = torch.cat(latents)
        with replacing(cache) as file:
            torch.save(stored, file)
    return stored, requests


def draw_examples(latents: Tensor, requests: list[Request], step: int) -> tuple[Tensor, list[str], torch.Generator]:
    """Draws the examples of one training step, the same ones each time.

    Args:
        latents: (N, 4, 8, 8) of all training scenes.
        requests: their true captions.
        step: the step's number.

    Returns:
        Latents (B, 4, 8, 8), B captions of which some are wrong and some are left out, and the generator for what else
        the step draws.
    """
    generator = seeded_generator(step)
    rows = torch.randint(len(latents), (BATCH,), generator=generator)
    uniform = torch.rand(BATCH, generator=generator).tolist()
    texts = []
    for row, value in zip(rows.tolist(), uniform, strict=True):
        request = corrupt(requests[row], generator) if value > 1 - CORRUPTED_CAPTIONS else requests[row]
        texts.append("" if value < EMPTY_CAPTIONS else str(request))
    return latents[rows], texts, generator


def train_unet(vae: AutoencoderKL, folder: Path, steps: int = UNET_STEPS) -> StableDiffusionPipeline:
    """Trains the denoiser and the text encoder together, on latents and captions of which some are wrong."""
    latents, requests = encode_scenes(vae, folder)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    latents = latents * vae.config.scaling_factor
    if not (folder / "tokenizer").exists():
        # It is kept, because a tokenizer made anew numbers the words in another order.
        make_tokenizer().save_pretrained(folder / "tokenizer")
    tokenizer, scheduler = CLIPTokenizer.from_pretrained(folder / "tokenizer"), make_scheduler()
    unet = make_unet()
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions are faster so
    modules = nn.ModuleDict({"unet": unet, "text_encoder": make_text_encoder(tokenizer)})

    def loss(step: int) -> Tensor:
        clean, texts, generator = draw_examples(latents, requests, step)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(len(scheduler.betas), (BATCH,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        velocity = scheduler.get_velocity(clean, noise, timesteps)
        tokens = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        hidden = modules["text_encoder"](tokens).last_hidden_state
        error = modules["unet"](noisy, timesteps, hidden).sample - velocity
        alpha_bar = scheduler.alphas_cumprod[timesteps]  # the signal-to-noise ratio plus 1 is 1 / (1 - alpha_bar)
        weight = ((SNR_CAP + 1) * (1 - alpha_bar)).clamp(max=1)
        return (weight * error.square().mean(dim=(1, 2, 3))).mean()

    averaged = minimise("unet", modules, loss, steps, UNET_LEARNING_RATE, folder, UNET_EMA_DECAY)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=averaged["text_encoder"],
        tokenizer=tokenizer,
        unet=averaged["unet"],
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main(arguments: Iterable[str] | None = None) -> None:
    """Trains both networks, or continues where an interrupted run stopped, and writes the pipeline's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("pretraining"), help="folder of checkpoints and log")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the finished pipeline")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    pipeline = train_unet(train_vae(options.work), options.work)
    pipeline.unet.to(memory_format=torch.contiguous_format)
    save_pipeline(pipeline, options.out)


if __name__ == "__main__":
    main()
