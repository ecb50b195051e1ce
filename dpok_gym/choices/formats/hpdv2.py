"""HPDv2, Human Preference Dataset v2: JSON files, with the images in a folder.

``train.json`` has pairs, ``{"prompt", "file_path": [...], "human_preference": [...]}``, with 1 for the preferred image.
``test.json`` has rankings, ``{"prompt", "image_path": [...], "rank": [...], "raw_annotations": [...]}``. ``rank`` is
the mean over people, and each of the annotations has ``rank``, one person's own, and ``user_hash``. The people's own
rankings become choices here, of each pair of images. The lower rank is preferred, and equal ranks are a tie.

The schema was seen in the dataset's card, huggingface.co/datasets/ymhao/HPDv2; how ranks are read, in ``evaluate.py``
of github.com/tgxs002/HPSv2. Paths begin at the folder of the images, which the authors' loader is given too.

What an export loses: all but the prompt, the two images and which is preferred. It writes ``train.json``, without ties.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpok_gym.choices.formats.files import (
    ImageStore,
    LeftOut,
    compare_ranked,
    find_image,
    list_files,
    naming_row,
    read_rows,
    take_text,
    write_rows,
)
from dpok_gym.choices.records import Choice

CARRIES: frozenset[str] = frozenset()


def read(source: Path, root: Path, store: ImageStore) -> Iterator[Choice | LeftOut]:
    """Reads JSON files; see the package."""
    for path in list_files(source, ".json"):
        for number, row in enumerate(read_rows(path, ("prompt",)), 1):
            with naming_row(path, number):
                items = [*_parse(row, root)]
            yield from items


def _parse(row: dict[str, Any], root: Path) -> Iterator[Choice | LeftOut]:
    prompt = take_text(row, "prompt")
    if "human_preference" in row:
        preferences = _take_list(row, "human_preference")
        if any(preference not in (0, 1) for preference in preferences):
            raise ValueError(f"'human_preference' must have 1 for the preferred image and 0 else, not {preferences!r}")
        images = [find_image(root, name) for name in _take_list(row, "file_path")]
        for item in compare_ranked(prompt, images, [1 - preference for preference in preferences]):
            # Two images with the same number are no tie: it only says which image of a pair is preferred.
            is_tie = isinstance(item, Choice) and item.reason == "tie"
            yield LeftOut("without a preferred image") if is_tie else item
        return
    images = [find_image(root, name) for name in _take_list(row, "image_path")]
    for annotation in row.get("raw_annotations") or [row]:
        if not isinstance(annotation, dict):
            raise ValueError(f"'raw_annotations' must be objects, not {annotation!r}")
        who = annotation.get("user_hash")
        yield from compare_ranked(prompt, images, _take_list(annotation, "rank"), None if who is None else str(who))


def _take_list(row: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(row.get(name), list):
        raise ValueError(f"{name!r} must be a list, not {row.get(name)!r}")
    return row[name]


def write(choices: Sequence[Choice], folder: Path) -> None:
    """Writes ``train.json`` and the images; see the package."""
    store = ImageStore(folder)
    rows = [
        {
            "human_preference": [int(choice.preferred == k) for k in (0, 1)],
            "prompt": choice.prompt,
            "file_path": [store.copy(image) for image in choice.images],
        }
        for choice in choices
    ]
    write_rows(folder / "train.json", rows)
