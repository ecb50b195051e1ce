"""LAION's improved aesthetic predictor: how much people like a picture, whatever the prompt.

Source: Schuhmann et al. 2022, "LAION-5B", and the repository improved-aesthetic-predictor. DDPO trains with it.
"""

from __future__ import annotations

from torch import Tensor

from dpok_gym.rewards.checkpoints import PathLike, build, find_file, read_state_dict
from dpok_gym.rewards.clip import TOKENIZER, embed_images, load_pretrained
from dpok_gym.rewards.network import Head, NetworkReward
from dpok_gym.rewards.preprocessing import normalize, resize_with_pillow


class Aesthetic(NetworkReward):
    """A rating, trained on people's ratings from 1 to 10; higher is better.

    Args:
        checkpoint: the published file ``sac+logos+ava1-l14-linearMSE.pth``; None takes it from the Hugging Face cache
            or hub, where TRL's authors keep it as ``aesthetic-model.pth``.
        clip: a folder or hub id of OpenAI's CLIP ViT-L/14, whose embedding the predictor reads.
        device: see :class:`~dpok_gym.rewards.network.NetworkReward`, as for the other arguments.
        dtype: of CLIP's weights.
        batch_size: pictures at once.

    Raises:
        FileNotFoundError: if a file cannot be had.
        ValueError: if one cannot be loaded or does not fit, or an argument is wrong.
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
        """See the base class."""
        pixels = normalize(resize_with_pillow(images, self._model.config.vision_config.image_size))
        return self._head(embed_images(self._model, pixels))
