"""transformers' CLIP for the rewards: loading, embedding, and the layout of open_clip's checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizerFast
from transformers.utils.logging import disable_progress_bar

from dpok_gym.rewards.networks.checkpoints import PathLike, StateDict, from_hub, load_tokenizer, rename
from dpok_gym.utils.hub import NO_CODE, describe_wrong_weights

#: The vocabulary that OpenAI's and LAION's models share.
TOKENIZER = "openai/clip-vit-large-patch14"

_RULES = (
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # transformers' spelling
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
)


def from_open_clip(tensors: Mapping[str, Tensor]) -> StateDict:
    """Maps the state dict of a CLIP of open_clip or OpenAI, with a vision transformer, to transformers' CLIPModel.

    open_clip keeps the query, key and value matrices in one tensor, and its projections transposed. Keys that open_clip
    does not have stay as they are.
    """
    result: StateDict = {}
    for old, value in tensors.items():
        key = rename(old, _RULES)
        if match := re.fullmatch(r"(.*\.self_attn\.)in_proj_(weight|bias)", key):
            for name, part in zip("qkv", value.chunk(3), strict=True):
                result[f"{match[1]}{name}_proj.{match[2]}"] = part
        else:
            result[key] = value.T if old in ("visual.proj", "text_projection") else value
    return result


def load_pretrained(reward: str, source: PathLike, argument: str, dtype: torch.dtype) -> CLIPModel:
    """Loads a CLIP from a folder or the hub, and makes sure that every weight comes from there.

    Args:
        reward: the reward's name, for error messages.
        source: a folder or hub id, as ``from_pretrained`` takes it.
        argument: the reward's keyword argument that ``source`` came from, for error messages.
        dtype: of the weights.

    Raises:
        FileNotFoundError: if the source is neither there nor can be downloaded.
        ValueError: if files are damaged, or weights are missing or of another shape.
    """
    disable_progress_bar()

    def load(name: str, local_files_only: bool) -> Any:
        settings = {"use_safetensors": True, "local_files_only": local_files_only, **NO_CODE}
        return CLIPModel.from_pretrained(name, dtype=dtype, output_loading_info=True, **settings)

    model, info = from_hub(reward, "a CLIP model", source, argument, load)
    if wrong := describe_wrong_weights(info):
        raise ValueError(
            f"the CLIP model {str(source)!r} of the reward {reward!r} {wrong}; get its files again, or pass another "
            f"{argument}="
        )
    return model.eval().requires_grad_(False)


class PromptEncoder:
    """Turns texts into token ids as CLIP does: in lower case, at most as many tokens as the model has positions.

    Args:
        reward: the reward's name, for error messages.
        source: a folder or hub id with CLIP's tokenizer.
        model: the CLIP that reads the tokens.

    Raises:
        FileNotFoundError: if the tokenizer is neither there nor can be downloaded.
        ValueError: if it cannot be loaded, or is another model's.
    """

    def __init__(self, reward: str, source: PathLike, model: CLIPModel) -> None:
        self._tokenizer = load_tokenizer(reward, "a CLIP tokenizer", source, CLIPTokenizerFast)
        config = model.config.text_config
        self._length = config.max_position_embeddings
        # Old checkpoints say that texts end with token 2. transformers then takes the token with the highest number.
        ends = {2, self._tokenizer.eos_token_id}
        if len(self._tokenizer) > config.vocab_size or config.eos_token_id not in ends:
            raise ValueError(
                f"the tokenizer {str(source)!r} has {len(self._tokenizer)} tokens and ends a text with number "
                f"{self._tokenizer.eos_token_id}, but the CLIP of the reward {reward!r} knows {config.vocab_size} and "
                f"expects {config.eos_token_id}; pass the tokenizer that it was trained with as tokenizer="
            )
        # The first call sets the tokenizer's padding and truncation. Two threads must not do that at the same time.
        self([""])

    def __call__(self, prompts: list[str]) -> Tensor:
        """Returns (B, L) int64. A text that is too long loses its end, but keeps the end token."""
        tokens = self._tokenizer(prompts, padding=True, truncation=True, max_length=self._length, return_tensors="pt")
        return tokens["input_ids"]


def embed_images(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Returns unit vectors (B, D) float32 for normalised ``pixels`` (B, 3, S, S)."""
    pooled = model.vision_model(pixel_values=pixels.to(model.dtype)).pooler_output
    return functional.normalize(model.visual_projection(pooled).float(), dim=-1)


def embed_tokens(model: CLIPModel, tokens: Tensor) -> Tensor:
    """Returns unit vectors (B, D) float32 for ``tokens`` (B, L)."""
    # No mask is needed: attention is causal, and the output is that of the first end token, before any padding.
    pooled = model.text_model(input_ids=tokens).pooler_output
    return functional.normalize(model.text_projection(pooled).float(), dim=-1)


def cosines(model: CLIPModel, pixels: Tensor, encode: PromptEncoder, prompts: list[str]) -> Tensor:
    """Returns the cosine (B,) float32 between each image, ``pixels`` (B, 3, S, S), and its prompt."""
    different = list(dict.fromkeys(prompts))  # in a rollout, many images share a prompt
    texts = embed_tokens(model, encode(different).to(pixels.device))
    rows = torch.tensor([different.index(prompt) for prompt in prompts], device=pixels.device)
    return (embed_images(model, pixels) * texts[rows]).sum(-1)
