"""Label Studio: the JSON export of tasks that were labelled with ``<Pairwise>``.

A task has ``data``, with a prompt and the addresses of two images, and ``annotations``, each with one person's answer:
``{"result": [{"type": "pairwise", "value": {"selected": "left"}}], "completed_by", "created_at", "lead_time"}``.
``was_cancelled`` says that it was skipped. The names of the data are free: the prompt is read from ``prompt``,
``caption`` or ``text``, and the images are the two texts that end like the name of an image, the left one first.

The schema was seen in labelstud.io/guide/task_format and labelstud.io/tags/pairwise. They do not show the value of an
answer, ``selected``: it is as in a test of another project, github.com/modelscope/data-juicer, and was not compared
with an export of Label Studio itself. The address ``/data/local-files/?d=...`` of an image was seen in issue 5649 of
github.com/HumanSignal/label-studio.

What an export loses: ties, since ``<Pairwise>`` has none; ids and repeats, hashes and origins. An export is ready for
Label Studio's local storage: set LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT to its folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from dpok_gym.choices.formats.files import (
    ImageStore,
    LeftOut,
    find_image,
    list_files,
    naming_row,
    parse_time,
    read_rows,
    take_text,
    write_rows,
)
from dpok_gym.choices.records import Choice

CARRIES = frozenset({"skip"})
_LOCAL, _UPLOADED = "/data/local-files/?d=", "/data/upload/"
_PROMPTS = ("prompt", "caption", "text")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def read(source: Path, root: Path, store: ImageStore) -> Iterator[Choice | LeftOut]:
    """Reads JSON files; see the package."""
    for path in list_files(source, ".json"):
        for number, task in enumerate(read_rows(path, ("data", "annotations")), 1):
            with naming_row(path, number):
                items = [*_parse(task, root)]
            yield from items


def _parse(task: dict[str, Any], root: Path) -> Iterator[Choice | LeftOut]:
    data, annotations = task["data"], task["annotations"]
    if not isinstance(data, dict) or not isinstance(annotations, list):
        raise ValueError("a task needs 'data', an object, and 'annotations', a list")
    prompts = [name for name in _PROMPTS if name in data]
    if not prompts:
        raise ValueError(f"its data have no {', '.join(map(repr, _PROMPTS))}; name the prompt so")
    prompt = take_text(data, prompts[0])
    names = [value for value in data.values() if isinstance(value, str) and value.lower().endswith(_SUFFIXES)]
    if len(names) != 2:
        raise ValueError(f"its data have {len(names)} images, not two")
    left, right = (find_image(root, _local_path(name)) for name in names)
    for annotation in annotations:
        selected = _selected(annotation)
        if selected is None or left == right:
            yield LeftOut("without an answer" if selected is None else "of an image with itself")
            continue
        preferred = None if selected == "skip" else int(selected == "right")
        reason = "skip" if selected == "skip" else None
        seconds = annotation.get("lead_time")
        yield Choice(
            prompt,
            (left, right),
            preferred,  # type: ignore[arg-type]
            reason,  # type: ignore[arg-type]
            _person(annotation.get("completed_by")),
            parse_time(annotation.get("created_at")),
            0,
            round(1000 * seconds) if isinstance(seconds, int | float) else None,
            None if annotation.get("id") is None else str(annotation["id"]),
        )


def _selected(annotation: Any) -> str | None:
    """Returns "left", "right" or "skip"; None if there is no answer."""
    if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
        raise ValueError(f"an annotation needs a list 'result': {annotation!r}")
    if annotation.get("was_cancelled"):
        return "skip"
    for part in annotation["result"]:
        if isinstance(part, dict) and part.get("type") == "pairwise":
            selected = part["value"].get("selected") if isinstance(part.get("value"), dict) else None
            if selected not in ("left", "right"):
                raise ValueError(f"'selected' must be left or right, not {selected!r}")
            return selected
    return None


def _person(completed_by: Any) -> str | None:
    if isinstance(completed_by, dict):
        completed_by = completed_by.get("email", completed_by.get("id"))
    return None if completed_by is None else str(completed_by)


def _local_path(address: str) -> str:
    for prefix in (_LOCAL, _UPLOADED):
        if address.startswith(prefix):
            return unquote(address.removeprefix(prefix))
    if "://" in address:
        raise ValueError(f"the image {address!r} is not on this machine; download it, and write its path there")
    return address


def write(choices: Sequence[Choice], folder: Path) -> None:
    """Writes ``tasks.json`` and the images; see the package."""
    store = ImageStore(folder)
    tasks = []
    for number, choice in enumerate(choices, 1):
        shown = choice.images[::-1] if choice.left == 1 else choice.images  # the left one first
        names = [_LOCAL + quote(store.copy(image)) for image in shown]
        is_right = choice.favourite == shown[1]
        value = {"selected": "right" if is_right else "left"}
        answer = {"from_name": "pairwise", "to_name": "image1,image2", "type": "pairwise", "value": value}
        annotation = {
            "id": number,
            "result": [] if choice.preferred is None else [answer],
            "was_cancelled": choice.preferred is None,
            "completed_by": None if choice.who is None else {"email": choice.who},
            "created_at": choice.when,
            "lead_time": None if choice.milliseconds is None else choice.milliseconds / 1000,
        }
        data = {"prompt": choice.prompt, "image1": names[0], "image2": names[1]}
        tasks.append({"id": number, "data": data, "annotations": [annotation]})
    write_rows(folder / "tasks.json", tasks)
