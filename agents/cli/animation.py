"""Animations of images, as GIF files."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from numpy.typing import NDArray
from PIL import Image

from agents.cli.plots import INK, make_cells, wrap_caption
from dpok_gym.utils.files import replacing

#: Milliseconds of a frame, and of the last one; dots per inch.
_EACH, _LAST, _DPI = 500, 2500, 100


def write_gif(
    rows: Mapping[str, NDArray[np.uint8]],
    times: Sequence[str],
    path: Path,
    title: str = "",
    captions: Sequence[str] = (),
    block: int = 1,
) -> Path:
    """Writes an animation of rows of images.

    Args:
        rows: (F, B, H, W, 3) uint8, F frames of B images side by side, by the text beside the row.
        times: a text for each frame that says when it is.
        path: file to write.
        title: text above the images.
        captions: B texts above the images; none if it is empty.
        block: rows that belong together.

    Returns:
        The file.
    """
    columns = next(iter(rows.values())).shape[1]
    wrapped = [wrap_caption(text) for text in captions]
    gap = 0.16 * max((text.count("\n") + 1 for text in wrapped), default=0)
    figure, cells = make_cells(len(rows), columns, f"{title}\n{times[0]}", gap, legend=False, margin=1.35, block=block)
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(_DPI)
    shown = []
    for axes_of_row, (label, frames) in zip(cells, rows.items(), strict=True):
        style = {"transform": axes_of_row[0].transAxes, "ha": "right", "va": "center", "fontsize": 8, "color": INK}
        axes_of_row[0].text(-0.12, 0.5, label, **style)
        for axes, image in zip(axes_of_row, frames[0], strict=True):
            axes.spines[:].set_visible(False)
            shown.append(axes.imshow(image, interpolation="nearest"))
    for axes, text in zip(cells[0], wrapped, strict=False):
        axes.set_title(text, fontsize=7, color=INK, pad=4, parse_math=False)
    heading = figure.texts[0]
    lines = heading.get_text().split("\n")[:-1]  # the last line is the time
    pictures = []
    for index, text in enumerate(times):
        heading.set_text("\n".join([*lines, text]))
        images = itertools.chain.from_iterable(frames[index] for frames in rows.values())
        for artist, image in zip(shown, images, strict=True):
            artist.set_data(image)
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))
    with replacing(path) as part:
        durations = [*[_EACH] * (len(pictures) - 1), _LAST]
        pictures[0].save(part, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return path
