"""PickScore: a CLIP ViT-H/14 fine-tuned on which of two pictures people picked for their prompt.

Source: Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation".
"""

from __future__ import annotations

from torch import Tensor

from dpok_gym.rewards.checkpoints import PathLike
from dpok_gym.rewards.clip import PromptEncoder, cosines, load_pretrained
from dpok_gym.rewards.network import NetworkReward
from dpok_gym.rewards.preprocessing import normalize, resize_with_pillow


class PickScore(NetworkReward):
    """The logit of CLIP, exp(logit scale), which is about 100, times the cosine of picture and prompt.

    Args:
        checkpoint: a folder or hub id of the model.
        tokenizer: a folder or hub id with CLIP's tokenizer.
        device: see :class:`~dpok_gym.rewards.network.NetworkReward`, as for the other arguments.
        dtype: of the weights.
        batch_size: pictures at once.

    Raises:
        FileNotFoundError: if the model cannot be had.
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
        """See the base class."""
        side = self._model.config.vision_config.image_size
        pixels = normalize(resize_with_pillow(images, side, crop="transformers"))
        # Its prompts are not cleaned: the authors use transformers' tokenizer, which does not.
        return self._model.logit_scale.float().exp() * cosines(self._model, pixels, self._encode, prompts)
