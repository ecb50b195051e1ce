"""LAION's improved aesthetic predictor: people's rating of an image, without regard to its prompt.

Source: Schuhmann et al. 2022, "LAION-5B", and the repository improved-aesthetic-predictor. DDPO trains with it.
"""

from __future__ import annotations

from torch import Tensor

from dpok_gym.rewards.networks.base import Head, NetworkReward
from dpok_gym.rewards.networks.checkpoints import PathLike, build, find_file, read_state_dict
from dpok_gym.rewards.networks.clip import TOKENIZER, embed_images, load_pretrained
from dpok_gym.rewards.networks.preprocessing import normalize, resize_with_pillow


class Aesthetic(NetworkReward):
    """The predicted rating of an image, whatever the prompt. People's ratings go from 1 to 10; higher is better.

    It needs ``aesthetic-model.pth`` of ``trl-lib/ddpo-aesthetic-predictor`` and CLIP ViT-L/14.

    Args:
        checkpoint: the published file ``sac+logos+ava1-l14-linearMSE.pth``; None takes it from the Hugging Face cache
            or hub, where TRL's authors keep it as ``aesthetic-model.pth``.
        clip: a folder or hub id of OpenAI's CLIP ViT-L/14, whose embedding the predictor reads.
        device: see :class:`~dpok_gym.rewards.networks.base.NetworkReward`, also for the next two arguments.
        dtype: number format of CLIP.
        batch_size: images at once.

    Raises:
        FileNotFoundError: if a file is neither there nor can be downloaded.
        ValueError: if a file cannot be loaded or does not fit the network, or an argument is wrong.
    """

    def __init__(
        self,
        checkpoint: PathLike | None = None,
        clip: PathLike = TOKENIZER,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
    ) -> None:
        super().__init__(device, dtype, batch_size)
        path = find_file("aesthetic", checkpoint, "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
        model = load_pretrained("aesthetic", clip, "clip", self.dtype)
        del model.text_model, model.text_projection  # it reads no prompt
        self._head = build(path, lambda: Head(model.config.projection_dim), read_state_dict(path))
        self._head = self._head.to(self.device).float()
        self._model = model.to(self.device)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores at most ``batch_size`` images, see the base class."""
        pixels = normalize(resize_with_pillow(images, self._model.config.vision_config.image_size))
        return self._head(embed_images(self._model, pixels))
