"""Signals during a training: they end it at the next moment when nothing is half done."""

from __future__ import annotations

from stable_baselines3.common.callbacks import BaseCallback

from agents.cli.signals import SIGNALS
from agents.common import distributed


def agree() -> None:
    """Raises for a signal that has come. With several ranks it raises in all of them, and all of them must call this.

    If one rank were interrupted alone, the others would wait for it.
    """
    if distributed.count() == 1:
        SIGNALS.allow()
        return
    SIGNALS.share(distributed.largest(SIGNALS.received or 0))
    if SIGNALS.received is not None:
        SIGNALS.allow()


class InterruptCallback(BaseCallback):
    """Lets signals wait while an update is under way.

    Half an update can be neither saved nor undone, so the update is completed first. While images are drawn, a signal
    raises at once: the iteration is drawn again when the run is resumed. With several ranks it waits until they
    :func:`agree`.

    Attributes:
        updating: True while an update may be under way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.updating = False

    def _defer(self) -> None:
        self.updating = SIGNALS.deferred = True

    def _allow(self) -> None:
        self.updating = False
        agree()

    def _on_rollout_start(self) -> None:
        self._allow()
        # Policy gradients now draw images, and _on_step() sets this back. Forward-process algorithms that have drawn
        # all their images fit at once, and take no step.
        self._defer()

    def _on_step(self) -> bool:
        if distributed.count() == 1:
            self._allow()  # images are being drawn
        return True

    def _on_rollout_end(self) -> None:
        self._defer()

    def _on_training_end(self) -> None:
        self._allow()
