"""ImageReward: a BLIP fine-tuned on people's comparisons of images; the reward that the DPOK paper trains with.

Source: Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", and the
package image-reward 1.5.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import BertTokenizerFast, BlipConfig, BlipTextModel, BlipVisionModel

from dpok_gym.rewards.networks.base import Head, NetworkReward
from dpok_gym.rewards.networks.checkpoints import (
    PathLike,
    StateDict,
    build,
    find_file,
    load_tokenizer,
    read_state_dict,
    rename,
)
from dpok_gym.rewards.networks.preprocessing import normalize, resize_with_pillow

MAX_TOKENS = 35  # with the start and end tokens; the rest of a longer prompt is not read

# Mean and standard deviation of the raw score over the authors' data.
MEAN, STD = 0.16717362830052426, 1.0333394966054072

_RULES = (
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^vision\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"^vision\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^vision\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^vision\.blocks\.(\d+)\.attn\.", r"vision.encoder.layers.\1.self_attn."),
    (r"^vision\.blocks\.", "vision.encoder.layers."),
)

# Projections of BLIP's contrastive loss, and a buffer of consecutive numbers.
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


def blip_large() -> BlipConfig:
    """Returns the architecture of ImageReward-v1.0: a ViT-L/16, and a BERT base model that attends to it."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return BlipConfig(
        vision_config=vision | {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6},
        text_config={"num_attention_heads": 12, "encoder_hidden_size": 1024},
    )


class _Network(nn.Module):
    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(config.vision_config)
        self.text = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.mlp = Head(config.text_config.hidden_size)


class ImageReward(NetworkReward):
    """A score with mean 0 and standard deviation 1 over the authors' data; higher is better. DPOK's own reward.

    It needs ``ImageReward.pt`` of ``THUDM/ImageReward`` and the tokenizer of ``google-bert/bert-base-uncased``.

    Args:
        checkpoint: the published file ``ImageReward.pt``; None takes it from the Hugging Face cache or hub.
        tokenizer: a folder or hub id with the tokenizer of ``bert-base-uncased``.
        device: see :class:`~dpok_gym.rewards.networks.base.NetworkReward`, also for the next two arguments.
        dtype: number format of the network.
        batch_size: images at once.
        config: the network's architecture; None for the published one.

    Raises:
        FileNotFoundError: if a file is neither there nor can be downloaded.
        ValueError: if a file cannot be loaded or does not fit the network, or an argument is wrong.
    """

    half_on_gpu = False

    def __init__(
        self,
        checkpoint: PathLike | None = None,
        tokenizer: PathLike = "google-bert/bert-base-uncased",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
        config: BlipConfig | None = None,
    ) -> None:
        super().__init__(device, dtype, batch_size)
        config = config or blip_large()
        path = find_file("image-reward", checkpoint, "THUDM/ImageReward", "ImageReward.pt")
        network = build(path, lambda: _Network(config), _from_published(read_state_dict(path)))
        self._vision = network.vision.to(self.device, self.dtype)
        self._text = network.text.to(self.device, self.dtype)
        self._mlp = network.mlp.to(self.device).float()
        self._side = config.vision_config.image_size
        self._tokenizer = load_tokenizer("image-reward", "BERT's tokenizer", tokenizer, BertTokenizerFast)
        self._tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's; a prompt may contain them
        if len(self._tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"the tokenizer {str(tokenizer)!r} has {len(self._tokenizer)} tokens and the network of the reward "
                f"'image-reward' only {config.text_config.vocab_size}; pass that of bert-base-uncased as tokenizer="
            )
        # The first call sets the tokenizer's padding and truncation. Two threads must not do that at the same time.
        self._tokenize([""])

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores at most ``batch_size`` images, see the base class."""
        pixels = normalize(resize_with_pillow(images, self._side)).to(self.dtype)
        tokens = self._tokenize(prompts)
        read = self._text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=self._vision(pixel_values=pixels).last_hidden_state,
        ).last_hidden_state
        return (self._mlp(read[:, 0].float()) - MEAN) / STD

    def _tokenize(self, prompts: list[str]) -> Any:
        """Returns ``input_ids`` and ``attention_mask``, each (B, L)."""
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": MAX_TOKENS}
        return self._tokenizer(prompts, return_tensors="pt", **options).to(self.device)


def _from_published(tensors: StateDict) -> StateDict:
    """Maps the published state dict to that of :class:`_Network`."""
    return {rename(key, _RULES): value for key, value in tensors.items() if not key.startswith(_UNUSED)}
