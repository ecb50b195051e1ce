"""Why some of diffusers' pipelines are not supported, and what would be needed."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: A reason by a regular expression of the names of pipelines. The first that fits counts.
REASONS: dict[str, str] = {
    "LatentConsistency": "the sampler of latent-consistency models does not take DDIM's Gaussian steps",
    "SanaSprint": (
        "Sana-Sprint was distilled for a sampler of a few steps, which are not the Gaussian steps of Sana; take the "
        "Sana model that it comes from"
    ),
    "Video|I2V|^Wan|^LTX|Mochi|Allegro|Latte|EasyAnimate|AnimateDiff|SkyReels|ToWorld|SanaWM|Helios": (
        "it draws videos: that needs latents (B, C, frames, h, w), an autoencoder that decodes them in parts, and "
        "rewards of videos"
    ),
    "Edit|Img2Img|Inpaint|Fill|Control|Kontext|Adapter|Pix2Pix|Upscale|Depth2Img": (
        "it draws from another image: take the plain text-to-image pipeline of the model, which "
        "AutoPipelineForText2Image.from_pipe(pipe) makes for most"
    ),
    "PAG": "its guidance changes the attention of the denoiser; take the pipeline of the model without PAG",
    "^Flux2Pipeline": "its text encoder is a Mistral 3 with 24 billion parameters; take FLUX.2-klein",
    "^QwenImage": (
        "its guidance rescales each token of the output to the norm of the conditional one, so that the output is not "
        "linear in the two passes; that needs a KL penalty on the guided output, prompts of different lengths with a "
        "mask, and an autoencoder of videos"
    ),
    "^ZImage": (
        "its denoiser takes lists of prompts of different lengths, which need filling up and a mask here; its time "
        "runs backwards, and its output is the negative velocity"
    ),
    "StableCascade|Wuerstchen": (
        "it is two models, one after the other, with a noise schedule of their own; that needs a table of that "
        "schedule, and a prior whose latents a second model decodes"
    ),
    "AuraFlow|Lumina|HiDream|Chroma|CogView4|Kolors|HunyuanDiT|HunyuanImage|OmniGen|PixArtAlpha|Ovis|LongCatImage": (
        "its steps would fit; it needs a file of its own beside dpok_gym/models/pixart_sigma.py, with its text "
        "encoders and the call of its denoiser"
    ),
    "^IF|UnCLIP|KandinskyCombined|KandinskyV22": "its image comes from two or three models, one after the other",
}


def describe_unsupported(pipeline: str, supported: Iterable[str]) -> str:
    """Returns a sentence that says that a pipeline is not supported, and why if that is known.

    Args:
        pipeline: the name of its class.
        supported: the names of those that are.
    """
    reasons = (reason for pattern, reason in REASONS.items() if re.search(pattern, pipeline))
    reason = next(reasons, None)
    return f"it is a {pipeline}, and only {', '.join(supported)} are supported" + (f": {reason}" if reason else "")
