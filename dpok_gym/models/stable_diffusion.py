"""Stable Diffusion 1.x and everything of the same build, the embedded model included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from dpok_gym.models.base import Conditioning, TextToImageModel


class StableDiffusion(TextToImageModel):
    """The networks of a diffusers ``StableDiffusionPipeline``.

    Args:
        name: how the model was asked for.
        tokenizer: a CLIP tokenizer. If its config has a list ``words``, prompts may use these words only.
        text_encoder: a CLIP text encoder.
        unet: the denoiser.
        vae: the autoencoder.
        scheduler_config: config of any diffusers scheduler.
        device: where the networks are put.
    """

    def __init__(
        self,
        name: str,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler_config: dict[str, Any],
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        self.name = name
        self.device = torch.device(device)
        self.dtype = unet.dtype
        self.tokenizer = tokenizer
        self.text_encoder, self.denoiser, self.vae = (
            network.to(self.device).eval().requires_grad_(False) for network in (text_encoder, unet, vae)
        )
        self.scheduler_config = scheduler_config
        side = unet.config.sample_size
        self.latent_shape = (unet.config.in_channels, side, side)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_shape = (factor * side, factor * side)
        self.text_width = text_encoder.config.hidden_size
        self.vocab_size = len(tokenizer)
        self.max_tokens = tokenizer.model_max_length

    @classmethod
    def from_pretrained(cls, name: str, source: str, device: str, dtype: torch.dtype) -> StableDiffusion:
        """Loads a diffusers folder or a hub id; errors as in :func:`dpok_gym.models.load_model`."""
        folder = _find_folder(name, source)
        try:
            family = json.loads((folder / "model_index.json").read_text())["_class_name"]
            if family != "StableDiffusionPipeline":
                raise ValueError(f"it is a {family}, and only StableDiffusionPipeline is supported")
            disable_progress_bar()  # of transformers, for a file that loads in no time
            # The parts are loaded one by one: the pipeline class would import image processors that nobody needs.
            return cls(
                name,
                CLIPTokenizer.from_pretrained(folder / "tokenizer"),
                CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype),
                UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype),
                AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype),
                DDIMScheduler.load_config(folder, subfolder="scheduler"),
                device,
            )
        except Exception as error:
            raise ValueError(
                f"the model folder {folder} cannot be loaded: {error}. It must be a whole diffusers pipeline "
                "(model_index.json, tokenizer, text_encoder, unet, vae, scheduler); if a file is damaged, get it again"
            ) from error

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """See the base class."""
        words = self.tokenizer.init_kwargs.get("words")
        if words is not None:
            for prompt in prompts:
                unknown = [word for word in prompt.split() if word not in words]
                if unknown:
                    raise ValueError(
                        f"the model {self.name!r} cannot read {', '.join(map(repr, unknown))} in the prompt "
                        f"{prompt!r}; its words are: {' '.join(words)}"
                    )
        lists = self.tokenizer(list(prompts), padding="max_length")["input_ids"]
        for prompt, ids in zip(prompts, lists, strict=True):
            if len(ids) > self.max_tokens:
                raise ValueError(
                    f"a prompt has {len(ids)} tokens and the model {self.name!r} reads at most {self.max_tokens} "
                    f"(start and end included); shorten it: {prompt!r}"
                )
        return torch.tensor(lists, dtype=torch.int64)

    @torch.no_grad()
    def _encode(self, tokens: Tensor) -> Conditioning:
        return {"encoder_hidden_states": self.text_encoder(tokens).last_hidden_state}

    def text_features(self, conditioning: Conditioning) -> Tensor:
        """See the base class: the mean over the tokens."""
        return conditioning["encoder_hidden_states"].mean(dim=1)

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """See the base class."""
        denoiser = self.denoiser if denoiser is None else denoiser
        latents = latents.to(self.dtype)
        if guidance_scale == 1:
            return denoiser(latents, timesteps, **conditioning).sample.float()
        empty = self.encode(self.tokenize([""]))
        both = {name: torch.cat([empty[name].expand_as(told), told]) for name, told in conditioning.items()}
        output = denoiser(torch.cat([latents] * 2), torch.cat([timesteps] * 2), **both).sample.float()
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See the base class."""
        latents = latents.to(self.device, self.dtype) / self.vae.config.scaling_factor
        return (self.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


def _find_folder(name: str, source: str) -> Path:
    """The local folder of a pipeline, from the hub or its cache if need be."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} is no diffusers pipeline: it has no model_index.json")
        return folder
    try:
        from diffusers import StableDiffusionPipeline

        return Path(StableDiffusionPipeline.download(source, use_safetensors=True))
    except Exception as error:
        raise FileNotFoundError(
            f"the model {name!r} is neither a local folder, nor in the Hugging Face cache, nor could it be "
            f"downloaded as {source!r} ({type(error).__name__}). Ways out: pass model='/path/to/a/diffusers/folder'; "
            f"run `hf download {source}` where there is a network and set HF_HOME to that cache; or use the embedded "
            "model, model='shapes', which needs no download"
        ) from error
