"""PickScore: a CLIP ViT-H/14 fine-tuned on people's choices between two images for their prompt.

Source: Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation".
"""

from __future__ import annotations

from torch import Tensor

from dpok_gym.rewards.networks.base import NetworkReward
from dpok_gym.rewards.networks.checkpoints import PathLike
from dpok_gym.rewards.networks.clip import PromptEncoder, cosines, load_pretrained
from dpok_gym.rewards.networks.preprocessing import normalize, resize_with_pillow


class PickScore(NetworkReward):
    """CLIP's logit: the cosine between image and prompt, times exp(logit scale), which is about 100.

    It needs ``yuvalkirstain/PickScore_v1`` and the tokenizer of ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``.

    Args:
        checkpoint: a folder or hub id of the model.
        tokenizer: a folder or hub id with CLIP's tokenizer.
        device: see :class:`~dpok_gym.rewards.networks.base.NetworkReward`, also for the next two arguments.
        dtype: number format of the network.
        batch_size: images at once.

    Raises:
        FileNotFoundError: if the model is neither there nor can be downloaded.
        ValueError: if it cannot be loaded, or an argument is wrong.
    """

    half_on_gpu = False  # the authors' example is float32

    def __init__(
        self,
        checkpoint: PathLike = "yuvalkirstain/PickScore_v1",
        tokenizer: PathLike = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
    ) -> None:
        super().__init__(device, dtype, batch_size)
        model = load_pretrained("pickscore", checkpoint, "checkpoint", self.dtype)
        self._encode = PromptEncoder("pickscore", tokenizer, model)
        self._model = model.to(self.device)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores at most ``batch_size`` images, see the base class."""
        side = self._model.config.vision_config.image_size
        pixels = normalize(resize_with_pillow(images, side, crop="transformers"))
        # Prompts are not cleaned, because the authors use transformers' tokenizer, which does not clean them.
        return self._model.logit_scale.float().exp() * cosines(self._model, pixels, self._encode, prompts)
