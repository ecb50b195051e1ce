"""Signals that end a command: Ctrl-C (SIGINT), SIGTERM of a cluster or a service, SIGHUP of a closed terminal."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Windows has no SIGHUP.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal asks the command to end.

    Attributes:
        exit_code: 128 plus the signal's number, as shells have it: 130, 143 or 129.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def exit_code(error: KeyboardInterrupt) -> int:
    """Returns the exit code of a command that was interrupted."""
    return getattr(error, "exit_code", 128 + signal.SIGINT)


class SignalHandler:
    """Raises :class:`Interrupted` in the main thread at the first signal, and leaves the process at the second.

    The second one does not wait for anything, such as a reward that hangs. What is on the disk then is whole.

    Attributes:
        received: the number of the first signal; None if none has come.
        deferred: whether the first signal waits until :meth:`allow`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles the signals within the block. Those that the process ignores, as under nohup, stay ignored."""
        self.received, self.deferred = None, False
        previous: dict[int, Any] = {}
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None is a handler of another language
                    previous[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def allow(self) -> None:
        """Lets a signal raise at once again, and raises for one that has come while it had to wait."""
        self.deferred = False
        if self.received is not None:
            raise Interrupted(self.received)

    def share(self, number: int) -> None:
        """Takes a signal that another process has received, as if it were this one's; 0 for none."""
        self.received = self.received or number or None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os.write(2, b"\ndpok: left at once\n")  # print() may be under way in the code that was interrupted
            os._exit(128 + number)
        self.received = number
        if not self.deferred:
            raise Interrupted(number)
        os.write(2, b"\ninterrupted: what is under way is finished first (a second signal leaves at once)\n")


#: The handler of the process, which ``main`` installs.
SIGNALS = SignalHandler()
