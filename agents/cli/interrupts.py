"""Ctrl-C during a training: it ends the training at the next moment when nothing is half done."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from stable_baselines3.common.callbacks import BaseCallback


class InterruptCallback(BaseCallback):
    """Raises KeyboardInterrupt after Ctrl-C, once no update is under way.

    Half an update can be neither saved nor undone, so the update is completed first. A second Ctrl-C raises at once.
    As a context manager it handles the signal itself within the block.

    Attributes:
        updating: True while an update may be under way.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pending = False
        self._previous: Any = None
        self.updating = False

    def __enter__(self) -> Self:
        # Python lets only the main thread set handlers. Shells start background jobs with the signal ignored; such a
        # process must still ignore it.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pending:
            raise KeyboardInterrupt
        self._pending = True
        if self.updating:
            print("\ninterrupted: this update is finished first (Ctrl-C again leaves at once)", file=sys.stderr)

    def _raise_pending(self) -> None:
        if self._pending:
            raise KeyboardInterrupt

    def _on_rollout_start(self) -> None:
        self.updating = False
        self._raise_pending()
        # Policy gradients now draw images, and _on_step() sets this back to False. Forward-process algorithms that have
        # drawn all their images fit at once, and take no step.
        self.updating = True

    def _on_step(self) -> bool:
        self.updating = False  # images are being drawn
        self._raise_pending()
        return True

    def _on_rollout_end(self) -> None:
        self.updating = True

    def _on_training_end(self) -> None:
        self.updating = False
        self._raise_pending()
