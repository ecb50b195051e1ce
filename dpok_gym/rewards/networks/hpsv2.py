"""Human Preference Score v2 and v2.1: a CLIP ViT-H/14 fine-tuned on people's rankings of images.

Source: Wu et al. 2023, "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
Synthesis", and the package hpsv2 1.2.0.
"""

from __future__ import annotations

from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from dpok_gym.rewards.networks.base import NetworkReward
from dpok_gym.rewards.networks.checkpoints import PathLike, build, find_file, read_state_dict
from dpok_gym.rewards.networks.clip import TOKENIZER, PromptEncoder, cosines, from_open_clip
from dpok_gym.rewards.networks.preprocessing import clean_prompt, normalize, resize_with_torch


def vit_h_14() -> CLIPConfig:
    """Returns the architecture that open_clip calls ViT-H-14."""
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPConfig(
        vision_config=vision | {"patch_size": 14, "image_size": 224, "hidden_act": "gelu"},
        text_config=text | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "hidden_act": "gelu"},
        projection_dim=1024,
    )


class HPSv2(NetworkReward):
    """The cosine between the embeddings of image and prompt, in [-1, 1]; like CLIP's, it stays far below 1.

    It needs ``HPS_v2_compressed.pt`` of ``xswu/HPSv2`` and CLIP's tokenizer. The authors resize tensors with
    torchvision. Here they are resized as by its version 0.17 and later, with antialiasing.

    Args:
        checkpoint: the published file ``HPS_v2_compressed.pt`` (for :class:`HPSv21`, ``HPS_v2.1_compressed.pt``); None
            takes it from the Hugging Face cache or hub.
        tokenizer: a folder or hub id with CLIP's tokenizer.
        device: see :class:`~dpok_gym.rewards.networks.base.NetworkReward`, also for the next two arguments.
        dtype: number format of the network.
        batch_size: images at once.
        config: the network's architecture; None for the published one.

    Raises:
        FileNotFoundError: if a file is neither there nor can be downloaded.
        ValueError: if a file cannot be loaded or does not fit the network, or an argument is wrong.
    """

    name, filename = "hpsv2", "HPS_v2_compressed.pt"

    def __init__(
        self,
        checkpoint: PathLike | None = None,
        tokenizer: PathLike = TOKENIZER,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
        config: CLIPConfig | None = None,
    ) -> None:
        super().__init__(device, dtype, batch_size)
        path = find_file(self.name, checkpoint, "xswu/HPSv2", self.filename)
        model = build(path, lambda: CLIPModel(config or vit_h_14()), from_open_clip(read_state_dict(path)))
        self._encode = PromptEncoder(self.name, tokenizer, model)
        self._model = model.to(self.device, self.dtype)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores at most ``batch_size`` images, see the base class."""
        pixels = normalize(resize_with_torch(images, self._model.config.vision_config.image_size))
        return cosines(self._model, pixels, self._encode, [clean_prompt(prompt) for prompt in prompts])


class HPSv21(HPSv2):
    """The network of HPSv2, trained on better rankings. It needs ``HPS_v2.1_compressed.pt`` of ``xswu/HPSv2``."""

    name, filename = "hpsv2.1", "HPS_v2.1_compressed.pt"
