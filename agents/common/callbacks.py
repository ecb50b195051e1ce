"""A progress bar beside the learning."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm


class ProgressCallback(BaseCallback):
    """A progress bar in images, with the mean reward and the latest update's statistics.

    Once two iterations have run, it says how long the others will take. The bar of a training that draws no images is
    in optimiser steps.

    Args:
        total: number of images that the training will have drawn in the end, or of optimiser steps if it draws none.
        disable: True for no bar; None shows it in a terminal only.
        seconds: seconds that the training has taken before, in another process; the log goes on from them.
    """

    def __init__(self, total: int, disable: bool | None = None, seconds: float = 0.0) -> None:
        super().__init__()
        self._bar: tqdm | None = None
        self._total, self._disable = total, disable
        self._started: float | None = None
        self._seconds = seconds
        #: When the first iterations of this process began, and what was done until then.
        self._begun: list[tuple[float, int]] = []

    def _on_training_start(self) -> None:
        self._bar = tqdm(
            total=self._total, initial=self._done(), unit=f" {self._unit}s", disable=self._disable, dynamic_ncols=True
        )
        self._started = time.perf_counter()
        if self._seconds and self._done():
            # SB3 computes the seconds and the speed that it logs from these.
            self.model.start_time -= int(self._seconds * 1e9)
            self.model._num_timesteps_at_start = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if len(self._begun) == 3:
            return
        self._begun.append((time.perf_counter(), self._done()))
        if len(self._begun) == 3 and self._disable is not True:
            # The first iteration is slower: it compiles, and fills caches.
            (before, done_before), (now, done) = self._begun[1:]
            if done_before < done < self._total:
                seconds, left = (now - before) / (done - done_before), self._total - done
                time_left = format_seconds(seconds * left)
                tqdm.write(f"{left} {self._unit}s are left: {time_left}, at {seconds:.3g} seconds an {self._unit}")

    def _on_rollout_end(self) -> None:
        assert self._bar is not None
        self._bar.update(self._done() - self._bar.n)
        recent = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        parts = [f"reward {np.mean(recent):.3f}"] if recent else []
        agent: Any = self.model
        latest = agent.latest_metrics  # the logger has forgotten the row of the latest update
        if "kl_to_reference" in latest:
            parts.append(f"KL {latest['kl_to_reference']:.2f} nats")
        for name in ("denoising_loss", "preference_loss"):
            if name in latest:
                parts.append(f"update {agent._n_updates}, loss {latest[name]:.4f}")
        self._bar.set_postfix_str(", ".join(parts))

    def _on_training_end(self) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Seconds of training until now."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running

    def close(self) -> None:
        """Ends the bar where it is, also after an interruption."""
        if self._bar is not None:
            self._bar.close()
        self._seconds, self._started = self.seconds, None

    @property
    def _unit(self) -> str:
        return "image" if self.model.draws_images else "optimiser step"  # type: ignore[attr-defined]

    def _done(self) -> int:
        agent: Any = self.model
        return agent.num_timesteps // agent.process.num_inference_steps if agent.draws_images else agent._n_updates


def format_seconds(seconds: float) -> str:
    """Returns a duration for people to read: 50 seconds, 12 minutes, 3.5 hours, 2.1 days."""
    for unit, length, most in (("seconds", 1, 90), ("minutes", 60, 90), ("hours", 3600, 36)):
        if seconds < most * length:
            number = seconds / length
            return f"{number:.0f} {unit}" if unit != "hours" else f"{number:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"
