"""open-image-preferences-v1-binarized: Parquet files of a prompt, the chosen image and the rejected one.

The columns ``prompt``, ``chosen`` and ``rejected`` were seen in training scripts for the dataset on GitHub
(``DATASET_NAME_MAPPING`` of CHATS, from diffusers' examples). An image is a structure of its bytes and its path, as the
datasets library stores images.

What an export loses: all but the prompt and the two images. It has no ties, and the preferred image comes first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpok_gym.choices.formats.files import (
    ImageStore,
    LeftOut,
    import_parquet,
    list_files,
    naming_row,
    read_image_bytes,
    read_rows,
    take_text,
    write_parquet,
)
from dpok_gym.choices.records import Choice

CARRIES: frozenset[str] = frozenset()


def read(source: Path, root: Path, store: ImageStore) -> Iterator[Choice | LeftOut]:
    """Reads Parquet files; see the package."""
    for path in list_files(source, ".parquet"):
        for number, row in enumerate(read_rows(path, ("prompt", "chosen", "rejected")), 1):
            with naming_row(path, number):
                item = _parse(row, store)
            yield item


def _parse(row: dict[str, Any], store: ImageStore) -> Choice | LeftOut:
    (chosen, chosen_hash), (rejected, rejected_hash) = (
        store.add(row[name], f"its {name} image") for name in ("chosen", "rejected")
    )
    if chosen == rejected:
        return LeftOut("of an image with itself")
    return Choice(take_text(row, "prompt"), (chosen, rejected), 0, sha256=(chosen_hash, rejected_hash))


def write(choices: Sequence[Choice], folder: Path) -> None:
    """Writes one Parquet file; see the package."""
    import_parquet()
    import pyarrow

    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    schema = pyarrow.schema({"prompt": pyarrow.string(), "chosen": image, "rejected": image}.items())
    # The datasets library shows a structure as an image if it finds this.
    features: dict[str, Any] = {name: {"_type": "Image"} for name in ("chosen", "rejected")}
    features["prompt"] = {"dtype": "string", "_type": "Value"}
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})

    def make_row(choice: Choice) -> dict[str, Any]:
        ordered = choice.images[::-1] if choice.preferred else choice.images
        files = [{"bytes": read_image_bytes(path), "path": path.name} for path in ordered]
        return {"prompt": choice.prompt, "chosen": files[0], "rejected": files[1]}

    write_parquet(folder / "train-00000-of-00001.parquet", map(make_row, choices), schema)
