"""A reward for images of the real world that is learned from choices: CLIP, with a head, and perhaps a LoRA.

CLIP's own score of an image and a prompt is the cosine of their unit vectors v and t, times a scale. The head adds what
people's choices say beyond it:

    s = c v.t + sqrt(D) u.(v * t) + w.v

with c = exp(CLIP's logit scale + sqrt(D) b). The numbers b, u (D,) and w (D,) are learned and begin at 0, so the reward
begins as CLIP's own score: u weighs each feature of CLIP in the match of image and prompt, and w says how an image
should look whatever the prompt. A term in t alone would be the same for both images of a choice, and could not be
learned. The square roots make b and u as quick to learn as w: the entries of v * t are so much smaller than those of v,
and b is one number where w has D.

A LoRA (Hu et al. 2022) on the queries and values of both towers learns new features too. It needs far more choices, and
a fit takes hours instead of seconds, since images cannot be encoded once and for all.

Letters used for shapes: N choices, M different images, B images with their prompts, D the width of CLIP's vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import CLIPModel

from dpok_gym.rewards.networks.checkpoints import PathLike
from dpok_gym.rewards.networks.clip import TOKENIZER, PromptEncoder, embed_images, embed_tokens, load_pretrained
from dpok_gym.rewards.networks.preprocessing import clean_prompt, normalize, resize_and_crop
from dpok_gym.rewards.preference.reward import LearnedReward
from dpok_gym.utils.validation import check_integer

if TYPE_CHECKING:
    from dpok_gym.rewards.preference.data import Comparisons

#: The LoRA's rank is at most this.
MAX_RANK = 256
_TARGETS = ["q_proj", "v_proj"]
_ADAPTER = "choices"
_MAX_TEXTS = 10_000  # vectors of prompts that are kept: 30 MB of the largest CLIP


class ClipNetwork(nn.Module):
    """CLIP and the head on its features.

    Args:
        model: CLIP; with a rank it is changed in place.
        lora_rank: rank of the LoRA, 0 for none.
    """

    def __init__(self, model: CLIPModel, lora_rank: int = 0) -> None:
        super().__init__()
        if lora_rank:
            inject_adapter_in_model(
                LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=_TARGETS), model, _ADAPTER
            )
        self.model = model
        width = model.config.projection_dim
        self.log_factor = nn.Parameter(torch.zeros(()))
        self.match = nn.Parameter(torch.zeros(width))
        self.look = nn.Parameter(torch.zeros(width))

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Returns the scores (B,) of unit vectors (B, D) of images and of their prompts."""
        root = len(self.match) ** 0.5
        factors = (self.model.logit_scale.float() + root * self.log_factor).exp() + root * self.match
        return (image_features * (factors * text_features + self.look)).sum(-1)


class ClipReward(LearnedReward):
    """A learned head on CLIP's features, in float32.

    Args:
        clip: a folder or hub id of a CLIP of transformers, with its tokenizer.
        lora_rank: rank of a LoRA on both towers, at most 256; 0 learns the head only.
        device: see :class:`~dpok_gym.rewards.networks.base.NetworkReward`.
        batch_size: see there.

    Raises:
        FileNotFoundError: if the CLIP is neither there nor can be downloaded.
        ValueError: if it cannot be loaded, or an argument is wrong.
    """

    kind = "clip"
    network: ClipNetwork

    def __init__(
        self, clip: PathLike = TOKENIZER, lora_rank: int = 0, device: str = "auto", batch_size: int = 16
    ) -> None:
        super().__init__(device, "float32", batch_size)
        self.lora_rank = check_integer("the LoRA rank", lora_rank, minimum=0, maximum=MAX_RANK)
        self.clip = str(Path(clip).expanduser().resolve()) if Path(clip).expanduser().is_dir() else str(clip)
        model = load_pretrained("clip", self.clip, "clip", self.dtype)
        self._encode_prompts = PromptEncoder("clip", self.clip, model)
        self.network = ClipNetwork(model, self.lora_rank).to(self.device).eval().requires_grad_(False)
        self.learning_rate = 3e-4 if self.lora_rank else 5e-3
        self.image_size = model.config.vision_config.image_size
        self.resize = resize_and_crop
        self._texts: dict[str, Tensor] = {}  # vectors of prompts, if they do not change

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Returns the log-odds, up to a constant, with which each image is preferred.

        Args:
            images: (B, 3, H, W) in [0, 1], of any size; the central square is read.
            prompts: B texts, of which CLIP reads 77 tokens.

        Returns:
            (B,) float32, with a gradient if the images have one.
        """
        squares = resize_and_crop(images.to(self.device, torch.float32), self.image_size)
        return self.network(self._embed_images(squares), self._embed_prompts(prompts))

    def _embed_images(self, squares: Tensor) -> Tensor:
        return embed_images(self.network.model, normalize(squares))

    def _embed_prompts(self, prompts: list[str]) -> Tensor:
        """Returns the unit vectors (B, D) of prompts, each computed once."""
        vectors = {prompt: self._texts[prompt] for prompt in prompts if prompt in self._texts}
        if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in vectors]:
            tokens = self._encode_prompts([clean_prompt(prompt) for prompt in missing]).to(self.device)
            new = dict(zip(missing, embed_tokens(self.network.model, tokens), strict=True))
            vectors |= new
            if not self.lora_rank and len(self._texts) < _MAX_TEXTS:
                self._texts |= new
        return torch.stack([vectors[prompt] for prompt in prompts])

    @torch.no_grad()
    def encode(self, comparisons: Comparisons) -> Comparisons:
        """Replaces the images (M, 3, S, S) by their vectors (M, D), unless a LoRA changes these."""
        if self.lora_rank:
            return comparisons
        parts = comparisons.images.split(self.batch_size)
        return replace(
            comparisons, images=torch.cat([self._embed_images(self._to_float(part)).cpu() for part in parts])
        )

    def _to_float(self, images: Tensor) -> Tensor:
        return images.to(self.device).float() / 255

    def compare(self, batch: Comparisons) -> tuple[Tensor, Tensor]:
        """Returns the scores (N,) of the first images and of the second ones."""
        is_encoded = batch.images.ndim == 2
        vectors = batch.images.to(self.device) if is_encoded else self._embed_images(self._to_float(batch.images))
        texts = self._embed_prompts(batch.prompts)
        first, second = batch.pairs.to(self.device).T
        return self.network(vectors[first], texts), self.network(vectors[second], texts)

    def learned(self) -> dict[str, nn.Parameter]:
        """Returns the parameters of the head and of the LoRA."""
        named = self.network.named_parameters()
        return {name: value for name, value in named if not name.startswith("model.") or f".{_ADAPTER}." in name}

    def config(self) -> dict[str, Any]:
        """Returns where CLIP is from, and the LoRA's rank."""
        return {"clip": self.clip, "lora_rank": self.lora_rank}

    @classmethod
    def _make(
        cls, config: dict[str, Any], weights: dict[str, Tensor], path: Path, options: Mapping[str, Any]
    ) -> ClipReward:
        reward = cls(**config | dict(options))
        reward._restore(weights, path)
        return reward
