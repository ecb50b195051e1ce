"""ImageRewardDB: ranked images, in JSON files beside the images, or in Parquet files without them.

A row is one image: ``{"image_path", "prompt_id", "prompt", "classification", "image_amount_in_total", "rank",
"overall_rating", "image_text_alignment_rating", "fidelity_rating"}``. The images of a prompt become choices, of each
pair of them. The lower rank is preferred, and equal ranks are a tie.

The schema was seen in the dataset's card, huggingface.co/datasets/THUDM/ImageRewardDB; how ranks are read, in
``train/src/rank_pair_dataset.py`` of github.com/THUDM/ImageReward. Paths begin at the top folder of the dataset.

What an export loses: all but the prompt, the two images and which is preferred. Each choice becomes a ranking of two
images with an id of its own, and the ratings stay empty.
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

CARRIES = frozenset({"tie"})
_COLUMNS = ("image_path", "prompt_id", "prompt", "rank")


def read(source: Path, root: Path, store: ImageStore) -> Iterator[Choice | LeftOut]:
    """Reads JSON or Parquet files; see the package."""
    for path in list_files(source, ".json", ".parquet"):
        groups: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for number, row in enumerate(read_rows(path, _COLUMNS), 1):
            groups.setdefault(str(row["prompt_id"]), []).append((number, row))
        for rows in groups.values():
            with naming_row(path, rows[0][0]):
                prompt = take_text(rows[0][1], "prompt")
                images = [find_image(root, row["image_path"]) for _, row in rows]
                items = [*compare_ranked(prompt, images, [row["rank"] for _, row in rows])]
            yield from items


def write(choices: Sequence[Choice], folder: Path) -> None:
    """Writes ``choices.json`` and the images; see the package."""
    store = ImageStore(folder)
    empty = ("classification", "overall_rating", "image_text_alignment_rating", "fidelity_rating")
    rows = []
    for number, choice in enumerate(choices, 1):
        for k, image in enumerate(choice.images):
            row: dict[str, Any] = {"image_path": store.copy(image), "prompt": choice.prompt}
            row |= {"prompt_id": f"{number:06}", "image_amount_in_total": 2}
            row["rank"] = 1 if choice.preferred in (None, k) else 2
            rows.append(row | dict.fromkeys(empty))
    write_rows(folder / "choices.json", rows)
