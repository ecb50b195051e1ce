"""Pre-trains the embedded model from nothing: ``python -m dpok_gym.shapes.pretrain``.

First the autoencoder learns random scenes (0.94 M parameters, 4,400 steps of 32 pictures), then the denoiser and the
text encoder learn captioned ones together, in its latents (2.5 M parameters, 14,000 steps of 64). The shipped weights
took about 35 and 60 minutes on two cores. Interrupted, it goes on where it stopped; the log and the checkpoints are in
``--work``.

The shipped autoencoder was interrupted once, with the learning rate falling towards step 5,000 for its first 1,000
steps; the rest is as the script has it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dpok_gym.files import replacing
from dpok_gym.shapes import WEIGHTS
from dpok_gym.shapes.captions import WORDS, Request, sample_requested_scenes, spoil
from dpok_gym.shapes.scenes import IMAGE_SIZE, render, sample_scenes

VAE_STEPS, VAE_BATCH, VAE_LEARNING_RATE = 4400, 32, 3e-3
VAE_KL_WEIGHT = 2e-6  # on the sum over the 256 latent dimensions, as in latent diffusion

UNET_STEPS, UNET_BATCH, UNET_LEARNING_RATE = 14_000, 64, 1.5e-3
UNET_SCENES = 80_000  # encoded once; the noise and the spoilt captions are drawn anew at every step
CATEGORY_SHARES = (1, 2, 2, 3)  # colour, count, composition, location: the more there is to say, the more examples
UNET_EMA_DECAY = 0.999
SPOILT_CAPTIONS = 0.15  # share of training captions with one attribute wrong: what makes the model sloppy with prompts
EMPTY_CAPTIONS = 0.1  # share of training captions left out, for classifier-free guidance
SNR_CAP = 5.0  # less weight where there is little noise to remove, as in min-SNR weighting (Hang et al. 2023)

MAX_TOKENS, TEXT_WIDTH = 16, 64


def make_vae() -> AutoencoderKL:
    """The untrained autoencoder: 3x64x64 pictures to 4x8x8 latents, 0.94 M parameters."""
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


def vae_loss(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Reconstruction error plus a slight pull of the latents towards N(0, I); a scalar.

    Args:
        vae: the autoencoder.
        pictures: (B, 3, H, W) in [-1, 1].
    """
    with torch.autocast(pictures.device.type, torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
    error = reconstruction.float() - pictures
    return error.abs().mean() + 2 * error.square().mean() + VAE_KL_WEIGHT * posterior.kl().mean()


def seeded(step: int) -> torch.Generator:
    """The randomness of one training step, a function of its number alone: a resumed run repeats nothing."""
    torch.manual_seed(step)
    return torch.Generator().manual_seed(step)


def fit(
    name: str,
    modules: nn.ModuleDict,
    loss: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    folder: Path,
    ema_decay: float = 0.0,
    warmup: int = 100,
) -> nn.ModuleDict:
    """Minimises ``loss(step)`` with AdamW, the learning rate falling linearly to zero.

    Resumable: a checkpoint is written every 250 steps to ``folder/name.pt`` and continued from when it exists.

    Returns:
        The modules with their averaged weights (``ema_decay`` > 0) or their last ones.
    """
    averaged = torch.optim.swa_utils.AveragedModel(
        modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
    )
    optimizer = torch.optim.AdamW(modules.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(1 - step / steps, 0.0))
    )
    state: dict[str, Any] = {"modules": modules, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    checkpoint, first = folder / f"{name}.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        for key, part in state.items():
            part.load_state_dict(saved[key])
        first = saved["step"]
    running, started = 0.0, time.monotonic()
    for step in range(first, steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(modules)
        running += value.item()
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            line = {"stage": name, "step": step + 1, "loss": round(running / 50, 5), "seconds": round(seconds, 1)}
            print(json.dumps(line), flush=True)
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            running = 0.0
        if (step + 1) % 250 == 0 or step + 1 == steps:
            saved = {key: part.state_dict() for key, part in state.items()} | {"step": step + 1}
            with replacing(checkpoint) as file:
                torch.save(saved, file)
    return averaged.module if ema_decay else modules  # type: ignore[return-value]  # it is a copy of the modules


def train_vae(folder: Path, steps: int = VAE_STEPS) -> AutoencoderKL:
    """Trains the autoencoder on random scenes, one fresh batch a step."""
    vae = make_vae()

    def loss(step: int) -> Tensor:
        return vae_loss(vae, 2 * render(sample_scenes(VAE_BATCH, seeded(step))) - 1)

    fit("vae", nn.ModuleDict({"vae": vae}), loss, steps, VAE_LEARNING_RATE, folder)
    return vae


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer for which each word of the captions is one token.

    The words are also written into its configuration, so that a prompt with another word can be refused: byte-pair
    encoding would take it for a string of letters that the text encoder has never met.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(
        special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS, words=list(WORDS))


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder, a small CLIP text tower."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    """The untrained denoiser of 4x8x8 latents, 2.4 M parameters.

    Besides cross-attention at both resolutions, the prompt is pooled and added to the timestep's embedding, a short
    way for what it says of the whole picture: how many objects, and of which kinds.
    """
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers means the number of heads
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def make_scheduler() -> DDIMScheduler:
    """DDIM with the noise schedule of Stable Diffusion, for a network that predicts v as Stable Diffusion 2 does.

    An error in v at the noisiest steps, where it is decided what the picture shows, is one in the clean latent; the
    noise itself is nearly given there, and its error says little.
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
    """The latents (UNET_SCENES, 4, 8, 8), not yet scaled, of the training scenes, and the true captions."""
    cache, latents, requests = folder / "latents.pt", [], []
    stored = torch.load(cache) if cache.exists() else None
    for first in range(0, UNET_SCENES, 500):
        scenes, said = sample_requested_scenes(500, torch.Generator().manual_seed(first), CATEGORY_SHARES)
        requests += said
        if stored is None:
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(vae.encode(2 * render(scenes) - 1).latent_dist.mean.float())
    if stored is None:
        stored = torch.cat(latents)
        with replacing(cache) as file:
            torch.save(stored, file)
    return stored, requests


def train_unet(vae: AutoencoderKL, folder: Path, steps: int = UNET_STEPS) -> StableDiffusionPipeline:
    """Trains the denoiser and the text encoder together, on latents and (partly wrong) captions."""
    latents, requests = encode_scenes(vae, folder)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    latents = latents * vae.config.scaling_factor
    if not (folder / "tokenizer").exists():
        make_tokenizer().save_pretrained(folder / "tokenizer")  # made anew, it would number the words differently
    tokenizer, scheduler = CLIPTokenizer.from_pretrained(folder / "tokenizer"), make_scheduler()
    unet = make_unet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions are faster so
    modules = nn.ModuleDict({"unet": unet, "text_encoder": make_text_encoder(tokenizer)})
    tokens: dict[str, Tensor] = {}

    def tokenize(text: str) -> Tensor:
        if text not in tokens:
            tokens[text] = tokenizer(text, padding="max_length", return_tensors="pt").input_ids[0]
        return tokens[text]

    def caption(request: Request, fate: float, generator: torch.Generator) -> str:
        if fate < EMPTY_CAPTIONS:
            return ""
        return str(spoil(request, generator) if fate > 1 - SPOILT_CAPTIONS else request)

    def loss(step: int) -> Tensor:
        generator = seeded(step)
        rows = torch.randint(len(latents), (UNET_BATCH,), generator=generator)
        fates = torch.rand(UNET_BATCH, generator=generator).tolist()
        said = [caption(requests[row], fate, generator) for row, fate in zip(rows.tolist(), fates, strict=True)]
        noise = torch.randn(UNET_BATCH, *latents.shape[1:], generator=generator)
        timesteps = torch.randint(len(scheduler.betas), (UNET_BATCH,), generator=generator)
        noisy = scheduler.add_noise(latents[rows], noise, timesteps)
        velocity = scheduler.get_velocity(latents[rows], noise, timesteps)
        hidden = modules["text_encoder"](torch.stack([tokenize(text) for text in said])).last_hidden_state
        error = modules["unet"](noisy, timesteps, hidden).sample - velocity
        alpha = scheduler.alphas_cumprod[timesteps]  # the signal-to-noise ratio plus 1 is 1 / (1 - alpha)
        weight = ((SNR_CAP + 1) * (1 - alpha)).clamp(max=1)
        return (weight * error.square().mean(dim=(1, 2, 3))).mean()

    averaged = fit("unet", modules, loss, steps, UNET_LEARNING_RATE, folder, UNET_EMA_DECAY)
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
    # Half precision halves the folder. diffusers loads it as float32 unless told otherwise; transformers would keep
    # the text encoder in half precision, where it could not be combined with the others, so that stays as it is.
    pipeline.unet.half().to(memory_format=torch.contiguous_format)
    pipeline.vae.half()
    pipeline.save_pretrained(options.out)


if __name__ == "__main__":
    main()
