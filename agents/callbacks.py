"""What happens beside the learning: a progress bar, and saving."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from agents.on_policy import DenoisingAlgorithm

#: The agent's file in a run folder.
MODEL = "model.zip"


class ProgressCallback(BaseCallback):
    """A progress bar in pictures, with the rollout's mean reward and the last update's statistics.

    Args:
        pictures: that the training will draw in the end.
        disable: no bar; None shows it in a terminal only.
    """

    def __init__(self, pictures: int, disable: bool | None = None) -> None:
        super().__init__()
        self._bar: tqdm | None = None
        self._pictures, self._disable = pictures, disable
        self._started: float | None = None
        #: Seconds of training, known once the bar is closed.
        self.seconds = 0.0

    def _on_training_start(self) -> None:
        self._bar = tqdm(
            total=self._pictures, initial=self._drawn(), unit=" pictures", disable=self._disable, dynamic_ncols=True
        )
        self._started = time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert self._bar is not None
        self._bar.update(self._drawn() - self._bar.n)
        recent = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        said = [f"reward {np.mean(recent):.3f}"]
        latest = self.logger.name_to_value  # of the last update, if there was one and the algorithm has such a thing
        if "train/kl_to_pretrained" in latest:
            said.append(f"KL {latest['train/kl_to_pretrained']:.2f} nats")
        if "train/denoising_loss" in latest:
            said.append(f"update {latest['train/n_updates']}, loss {latest['train/denoising_loss']:.4f}")
        self._bar.set_postfix_str(", ".join(said))

    def _on_training_end(self) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar where it is, also after an interruption."""
        if self._bar is not None:
            self._bar.close()
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None

    def _drawn(self) -> int:
        return self.model.num_timesteps // len(self.model.policy.schedule)  # type: ignore[arg-type]


class SaveCallback(BaseCallback):
    """Saves the agent before every ``every``-th rollout, when nothing is half done.

    Args:
        folder: where to, see :func:`save_agent`.
        every: iterations between two saves.
    """

    def __init__(self, folder: str | Path, every: int = 10) -> None:
        super().__init__()
        self._folder, self._every, self._iteration = Path(folder), every, 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._iteration and self._iteration % self._every == 0:
            assert isinstance(self.model, DenoisingAlgorithm)
            save_agent(self.model, self._folder)
        self._iteration += 1


def save_agent(agent: DenoisingAlgorithm, folder: str | Path) -> None:
    """Writes ``model.zip`` and, unless the whole denoiser is trained, the LoRA into ``lora/``.

    Each file is replaced at once, so whatever interrupts this leaves the old file or the new one.
    """
    folder = Path(folder)
    agent.save(folder / "model.part.zip")
    os.replace(folder / "model.part.zip", folder / MODEL)
    if agent.policy.lora is not None:
        written = agent.save_lora(folder / "lora.part")
        (folder / "lora").mkdir(exist_ok=True)
        os.replace(written, folder / "lora" / written.name)
        written.parent.rmdir()
