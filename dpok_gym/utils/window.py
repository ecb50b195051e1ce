"""A window on the screen that shows frames, by pygame, as Gymnasium's own environments have it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpok_gym.utils.serving import needs_extra

#: Pixels of the window's longer side: small frames are shown larger, and large ones smaller, about to this size.
_SIDE = 1024


class Window:
    """A window, which opens with the first frame. A copy of it is another window.

    Args:
        frames_per_second: how many frames are shown in a second, at most; :meth:`show` waits for that.

    Raises:
        ImportError: if the extra ``human`` is not installed.
    """

    def __init__(self, frames_per_second: int) -> None:
        with needs_extra("human"):
            import pygame
        self._pygame, self._frames_per_second = pygame, frames_per_second
        self._screen: Any = None
        self._clock = pygame.time.Clock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Window, (self._frames_per_second,)

    def show(self, frame: NDArray[np.uint8], caption: str) -> None:
        """Shows a frame.

        Args:
            frame: (H, W, 3) uint8, of the same size at every call.
            caption: title of the window.
        """
        pygame = self._pygame
        side = max(frame.shape[:2])
        # Whole numbers, so that every pixel is as large as the others.
        every, factor = math.ceil(side / _SIDE), max(_SIDE // side, 1)
        pixels = frame[::every, ::every]
        pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1).swapaxes(0, 1)  # pygame's first axis is the width
        if self._screen is None:
            pygame.display.init()
            self._screen = pygame.display.set_mode(pixels.shape[:2])
        pygame.display.set_caption(caption)
        pygame.surfarray.blit_array(self._screen, pixels)
        pygame.event.pump()  # or the system takes the window for one that hangs
        pygame.display.flip()
        self._clock.tick(self._frames_per_second)

    def close(self) -> None:
        """Closes the window, if it is open."""
        if self._screen is not None:
            self._pygame.display.quit()
            self._screen = None
