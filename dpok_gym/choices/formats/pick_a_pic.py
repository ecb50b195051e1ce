"""Pick-a-Pic, versions 1 and 2, as diffusers' script for Diffusion-DPO reads it: Parquet files with the images inside.

A row has ``caption``, two images ``jpg_0`` and ``jpg_1``, and the shares of a win ``label_0`` and ``label_1``: 1 and 0,
0 and 1, or 0.5 each for a tie. Rows with ``has_label`` False have no label that counts.

The columns were seen in ``trainer/datasetss/clip_hf_dataset.py`` of github.com/yuvalkirstain/PickScore, and in
``train_diffusion_dpo.py`` of github.com/huggingface/diffusers.

What an export loses: whether both images of a tie are bad, sides, response times, ids and repeats, and the origins but
for the name of the model. People become numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dpok_gym.choices.formats.files import (
    ImageStore,
    LeftOut,
    import_parquet,
    list_files,
    naming_row,
    parse_time,
    read_image_bytes,
    read_rows,
    take_text,
    write_parquet,
)
from dpok_gym.choices.records import Choice

CARRIES = frozenset({"tie"})
_REQUIRED = ("caption", "jpg_0", "jpg_1", "label_0")
_OPTIONAL = (
    "has_label",
    "image_0_uid",
    "image_1_uid",
    "model_0",
    "model_1",
    "user_id",
    "ranking_id",
    "created_at",
)


def read(source: Path, root: Path, store: ImageStore) -> Iterator[Choice | LeftOut]:
    """Reads Parquet files; see the package."""
    for path in list_files(source, ".parquet"):
        for number, row in enumerate(read_rows(path, _REQUIRED, _OPTIONAL), 1):
            with naming_row(path, number):
                item = _parse(row, store)
            yield item


def _parse(row: dict[str, Any], store: ImageStore) -> Choice | LeftOut:
    label = row["label_0"]
    if not row.get("has_label", True) or label is None:
        return LeftOut("without a label")
    if label not in (0, 0.5, 1):
        raise ValueError(f"'label_0' must be 0, 0.5 or 1, not {label!r}")
    (first, first_hash), (second, second_hash) = (store.add(row[name], f"its {name}") for name in ("jpg_0", "jpg_1"))
    if first == second:
        return LeftOut("of an image with itself")
    return Choice(
        take_text(row, "caption"),
        (first, second),
        None if label == 0.5 else int(1 - label),  # type: ignore[arg-type]
        "tie" if label == 0.5 else None,
        _as_text(row.get("user_id")),
        parse_time(row.get("created_at")),
        id=_as_text(row.get("ranking_id")),
        sha256=(first_hash, second_hash),
        origins=(_origin(row, 0), _origin(row, 1)),
    )


def _origin(row: dict[str, Any], k: int) -> dict[str, Any]:
    named = {"model": row.get(f"model_{k}"), "uid": row.get(f"image_{k}_uid")}
    return {name: value for name, value in named.items() if isinstance(value, str)}


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value)


def write(choices: Sequence[Choice], folder: Path) -> None:
    """Writes one Parquet file; see the package."""
    import_parquet()
    import pyarrow

    text, number = pyarrow.string(), pyarrow.float64()
    columns = {"are_different": pyarrow.bool_(), "best_image_uid": text, "caption": text}
    columns |= {"created_at": pyarrow.timestamp("ns"), "has_label": pyarrow.bool_()}
    for k in (0, 1):
        columns |= {f"image_{k}_uid": text, f"jpg_{k}": pyarrow.binary(), f"label_{k}": number, f"model_{k}": text}
    columns |= {"ranking_id": pyarrow.int64(), "user_id": pyarrow.int64()}
    people = {who: k for k, who in enumerate(dict.fromkeys(choice.who for choice in choices if choice.who), 1)}

    def make_row(ranking: int, choice: Choice) -> dict[str, Any]:
        uids = [image.stem for image in choice.images]
        # The dataset has no time zones.
        when = None if choice.when is None else datetime.fromisoformat(choice.when).replace(tzinfo=None)
        row = {"are_different": True, "caption": choice.prompt, "created_at": when, "has_label": True}
        row |= {"ranking_id": ranking, "user_id": people.get(choice.who or "")}
        row["best_image_uid"] = "" if choice.preferred is None else uids[choice.preferred]
        for k, image in enumerate(choice.images):
            row[f"image_{k}_uid"], row[f"jpg_{k}"] = uids[k], read_image_bytes(image)
            row[f"label_{k}"] = 0.5 if choice.preferred is None else float(choice.preferred == k)
            row[f"model_{k}"] = None if choice.origins is None else _as_text(choice.origins[k].get("model"))
        return row

    rows = (make_row(k, choice) for k, choice in enumerate(choices, 1))
    write_parquet(folder / "train-00000-of-00001.parquet", rows, pyarrow.schema(columns.items()))
