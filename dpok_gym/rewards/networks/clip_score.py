"""CLIP score: how similar an image and a text are.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", and, as a measure
of images, Hessel et al. 2021, "CLIPScore".
"""

from __future__ import annotations

from torch import Tensor

from dpok_gym.rewards.networks.base import NetworkReward
from dpok_gym.rewards.networks.checkpoints import PathLike
from dpok_gym.rewards.networks.clip import TOKENIZER, PromptEncoder, cosines, load_pretrained
from dpok_gym.rewards.networks.preprocessing import clean_prompt, normalize, resize_with_pillow


class ClipScore(NetworkReward):
    """The cosine between CLIP's embeddings of image and prompt, in [-1, 1]; it stays far below 1.

    This is the bare cosine: CLIP's logits are 100 times as large, CLIPScore is 2.5 times as large and never below 0.
    It needs ``openai/clip-vit-large-patch14``.

    Args:
        checkpoint: a folder or hub id of a CLIP model.
        tokenizer: a folder or hub id with its tokenizer.
        device: see :class:`~dpok_gym.rewards.networks.base.NetworkReward`, also for the next two arguments.
        dtype: number format of the network.
        batch_size: images at once.

    Raises:
        FileNotFoundError: if the model is neither there nor can be downloaded.
        ValueError: if it cannot be loaded, or an argument is wrong.
    """

    def __init__(
        self,
        checkpoint: PathLike = TOKENIZER,
        tokenizer: PathLike = TOKENIZER,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
    ) -> None:
        super().__init__(device, dtype, batch_size)
        model = load_pretrained("clip-score", checkpoint, "checkpoint", self.dtype)
        self._encode = PromptEncoder("clip-score", tokenizer, model)
        self._model = model.to(self.device)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores at most ``batch_size`` images, see the base class."""
        pixels = normalize(resize_with_pillow(images, self._model.config.vision_config.image_size))
        return cosines(self._model, pixels, self._encode, [clean_prompt(prompt) for prompt in prompts])
