"""Choices in the formats of other datasets and tools: small files made to their schemas, and there and back."""

import io
import json
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import get_args

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from dpok_gym.choices.formats import Format, export_choices, files, import_choices
from dpok_gym.choices.records import Choice, read_choices

PARQUET = ("pick-a-pic", "open-image-preferences")


def image_bytes(shade, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def save_images(folder, *names):
    for shade, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(shade))


def imported(source, name, folder, **settings):
    """Imports; returns the tally and the choices, without their lines."""
    tally = import_choices(source, name, folder, **settings)
    return tally, [replace(choice, line=0) for choice in read_choices(folder / "choices.jsonl")]


def content(choices):
    """What every format holds: the prompt, and the images and which is preferred, whatever their order."""
    rows = []
    for choice in choices:
        shares = {0: choice.outcome, 1: None if choice.outcome is None else 1 - choice.outcome}
        rows.append((choice.prompt, {path.read_bytes(): shares[k] for k, path in enumerate(choice.images)}))
    return rows


def pick_a_pic_row(**changes):
    row = {"are_different": True, "best_image_uid": "u0", "caption": "a cat", "created_at": datetime(2023, 5, 1, 12)}
    row |= {"has_label": True, "image_0_uid": "u0", "image_1_uid": "u1", "jpg_0": image_bytes(0, "JPEG")}
    row |= {"jpg_1": image_bytes(200, "JPEG"), "label_0": 1.0, "label_1": 0.0, "model_0": "sd-a", "model_1": "sd-b"}
    return row | {"ranking_id": 7, "user_id": 3} | changes


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# ------------------------------------------------------------------------------------------------- each format's schema


def test_pick_a_pic(tmp_path):
    rows = [pick_a_pic_row(), pick_a_pic_row(label_0=0.0, label_1=1.0), pick_a_pic_row(label_0=0.5, label_1=0.5)]
    rows += [pick_a_pic_row(has_label=False), pick_a_pic_row(jpg_1=image_bytes(0, "JPEG"))]
    write_parquet(tmp_path / "data" / "train-0.parquet", rows[:2])
    write_parquet(tmp_path / "data" / "train-1.parquet", rows[2:])
    tally, choices = imported(tmp_path / "data", "pick-a-pic", tmp_path / "out")
    assert [choice.outcome for choice in choices] == [1, 0, 0.5]
    assert (tally.choices, tally.ties, len(tally.images), tally.people) == (3, 1, 2, {"3"})
    assert tally.left_out == {"without a label": 1, "of an image with itself": 1}
    first = choices[0]
    assert (first.prompt, first.who, first.when) == ("a cat", "3", "2023-05-01T12:00:00")
    assert first.origins == ({"model": "sd-a", "uid": "u0"}, {"model": "sd-b", "uid": "u1"})
    assert [choice.id for choice in choices] == ["7", "7-2", "7-3"]  # each name stands for one choice
    assert [path.name for path in first.images] == [f"{digest}.jpeg" for digest in first.sha256]
    assert first.images[0].read_bytes() == image_bytes(0, "JPEG")
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2  # each image is written once


def test_hpdv2_pairs(tmp_path):
    save_images(tmp_path, "train/a.jpg", "train/b.jpg")
    rows = [
        {"prompt": "a cat", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1]},
        {"prompt": "a dog", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 0]},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    tally, choices = imported(tmp_path / "train.json", "hpdv2", tmp_path / "out", images=tmp_path / "train")
    images = (tmp_path / "train" / "a.jpg", tmp_path / "train" / "b.jpg")
    assert [(choice.prompt, choice.preferred) for choice in choices] == [("a cat", 1)]
    assert [path.resolve() for path in choices[0].images] == [*images]  # they stay where they are
    assert tally.left_out == {"without a preferred image": 1}


def test_hpdv2_rankings_of_several_people(tmp_path):
    save_images(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    row = {"prompt": "a cat", "image_path": ["a.jpg", "b.jpg", "c.jpg"], "rank": [2, 1, 3]}
    row["raw_annotations"] = [{"rank": [3, 1, 2], "user_hash": "u"}, {"rank": [1, 2, 2], "user_hash": "v"}]
    (tmp_path / "test.json").write_text(json.dumps([row]))
    tally, choices = imported(tmp_path / "test.json", "hpdv2", tmp_path / "out")
    assert [(choice.who, choice.outcome) for choice in choices] == [
        *[("u", 0.0), ("u", 0.0), ("u", 1.0)],  # a and b, a and c, b and c
        *[("v", 1.0), ("v", 1.0), ("v", 0.5)],
    ]
    assert (tally.ties, len(tally.images), tally.people) == (1, 3, {"u", "v"})


def test_image_reward_db(tmp_path):
    names = [f"images/train/train_1/{name}.webp" for name in "abc"]
    save_images(tmp_path, *names)
    rows = [
        {"image_path": name, "prompt_id": "000864-0061", "prompt": "a cat", "rank": rank, "overall_rating": 4}
        for name, rank in zip(names, [2, 1, None], strict=True)
    ]
    (tmp_path / "images" / "train" / "train_1" / "train_1.json").write_text(json.dumps(rows))
    tally, choices = imported(tmp_path, "image-reward-db", tmp_path.parent / f"{tmp_path.name}-out")
    assert [(choice.prompt, choice.outcome) for choice in choices] == [("a cat", 0.0)]
    assert tally.left_out == {"without a rank": 2}
    write_parquet(tmp_path / "metadata-train.parquet", rows)  # the same table, without the images
    _, again = imported(tmp_path / "metadata-train.parquet", "image-reward-db", tmp_path / "out")
    assert content(again) == content(choices)


def test_open_image_preferences(tmp_path):
    def wrap(shade):
        return {"bytes": image_bytes(shade), "path": "x.png"}

    rows = [{"prompt": "a cat", "chosen": wrap(1), "rejected": wrap(2)}]
    path = write_parquet(tmp_path / "train.parquet", rows)
    _, choices = imported(path, "open-image-preferences", tmp_path / "out")
    assert content(choices) == [("a cat", {image_bytes(1): 1.0, image_bytes(2): 0.0})]


def label_studio_task(selected="right", **changes):
    result = [{"from_name": "pw", "to_name": "img1,img2", "type": "pairwise", "value": {"selected": selected}}]
    annotation = {"id": 11, "completed_by": 4, "created_at": "2024-03-29T05:39:54.721157Z", "lead_time": 3.5}
    annotation |= {"result": result, "was_cancelled": False} | changes
    data = {"caption": "a cat", "first": "/data/local-files/?d=in%20here/a.png", "second": "/data/upload/b.png"}
    return {"id": 1, "data": data, "annotations": [annotation]}


def test_label_studio(tmp_path):
    save_images(tmp_path, "in here/a.png", "b.png")
    tasks = [label_studio_task(), label_studio_task("left"), label_studio_task(was_cancelled=True)]
    tasks += [label_studio_task(result=[]), label_studio_task(completed_by={"id": 4, "email": "ada@example.org"})]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    tally, choices = imported(tmp_path / "export.json", "label-studio", tmp_path / "out")
    assert [(choice.preferred, choice.reason) for choice in choices] == [
        (1, None),
        (0, None),
        (None, "skip"),
        (1, None),
    ]
    assert (tally.skips, tally.ties, tally.left_out) == (1, 0, {"without an answer": 1})
    first = choices[0]
    assert (first.prompt, first.who, first.left, first.milliseconds, first.id) == ("a cat", "4", 0, 3500, "11")
    assert first.when == "2024-03-29T05:39:54.721157+00:00"
    assert [path.name for path in first.images] == ["a.png", "b.png"]
    assert choices[-1].who == "ada@example.org"


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.fixture
def choices(tmp_path):
    """One of each answer, with all that our form has."""
    save_images(tmp_path, "a.png", "b.png", "c.png")
    a, b, c = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    common = {"who": "ada", "when": "2026-01-31T12:00:00", "milliseconds": 1500}
    origins = ({"model": "shapes", "run": None}, {"model": "other", "run": None})
    return [
        Choice("a cat", (a, b), 0, left=0, id="1", origins=origins, **common),
        Choice("a dog", (b, c), 1, left=1, id="2", **common),
        Choice("a dog", (b, c), 1, left=0, id="3", repeat_of="2", **common),
        Choice("a cat", (a, c), None, "tie", left=0, id="4", **common),
        Choice("a cat", (b, a), None, "both-bad", left=0, id="5", **common),
        Choice("a cat", (b, a), None, "skip", left=1, id="6", who="bob"),
    ]


@pytest.mark.parametrize("name", get_args(Format))
def test_there_and_back(name, choices, tmp_path):
    ties = name in ("pick-a-pic", "image-reward-db")
    skips = name == "label-studio"
    held = [c for c in choices if c.preferred is not None or (skips if c.reason == "skip" else ties)]
    written = export_choices(choices, name, tmp_path / "there")
    assert written.choices == len(held)
    assert sum(written.left_out.values()) == len(choices) - len(held)
    tally, back = imported(tmp_path / "there", name, tmp_path / "back")
    assert content(back) == content(held)
    assert (tally.choices, tally.ties, tally.skips) == (written.choices, written.ties, written.skips)
    assert not tally.left_out


def test_what_each_format_keeps_beside_the_choice(choices, tmp_path):
    export_choices(choices, "label-studio", tmp_path / "there")
    _, back = imported(tmp_path / "there", "label-studio", tmp_path / "back")
    kept = [c for c in choices if c.outcome != 0.5]
    assert [(c.who, c.when, c.milliseconds) for c in back] == [(c.who, c.when, c.milliseconds) for c in kept]
    sides = [(c.images[c.left or 0].read_bytes()) for c in kept]
    assert [c.images[c.left].read_bytes() for c in back] == sides  # what was on the left is there again
    export_choices(choices, "pick-a-pic", tmp_path / "pick")
    _, back = imported(tmp_path / "pick", "pick-a-pic", tmp_path / "pick-back")
    assert [c.who for c in back] == ["1"] * 5
    assert back[0].when == choices[0].when
    assert [origin["model"] for origin in back[0].origins] == ["shapes", "other"]


def test_what_diffusers_script_reads(choices, tmp_path):
    export_choices(choices, "pick-a-pic", tmp_path / "there")
    table = parquet.read_table(tmp_path / "there").to_pylist()
    for row, choice in zip(table, choices[:5], strict=True):  # the last one is a skip
        assert row["caption"] == choice.prompt
        assert [row["jpg_0"], row["jpg_1"]] == [path.read_bytes() for path in choice.images]
        assert [row["label_0"], row["label_1"]] == [choice.outcome, 1 - choice.outcome]


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/hosts.jpg", "is not inside"),
        ("../outside.jpg", "is not inside"),
        ("link.jpg", "is not inside"),
        ("sub/../../outside.jpg", "is not inside"),
        ("", "the path of an image must be a text"),
        (None, "the path of an image must be a text"),
        ("a\0.jpg", "the path of an image must be a text"),
    ],
)
def test_paths_that_leave_the_folder_are_refused(name, message, tmp_path):
    save_images(tmp_path, "outside.jpg", "data/a.jpg")
    (tmp_path / "data" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (tmp_path / "data" / "sub").mkdir()
    rows = [{"prompt": "a cat", "file_path": ["a.jpg", name], "human_preference": [1, 0]}]
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=rf"row 1 of .*train\.json: .*{message}"):
        import_choices(tmp_path / "data" / "train.json", "hpdv2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": " ", "file_path": [], "human_preference": []}, "'prompt' must be a text that is not blank"),
        ({"file_path": [], "human_preference": []}, "has no 'prompt'; is it of this format"),
        ({"prompt": "x", "file_path": ["a.jpg", "b.jpg"], "human_preference": [2, 0]}, "must have 1 for the preferred"),
        ({"prompt": "x", "file_path": "a.jpg", "human_preference": [1, 0]}, "'file_path' must be a list"),
        ({"prompt": "x", "file_path": ["a.jpg"], "human_preference": [1, 0]}, "needs a rank for each image"),
        ({"prompt": "x", "image_path": ["a.jpg", "b.jpg"], "rank": ["1", 2]}, "a rank must be a number"),
        ({"prompt": "x", "image_path": ["a.jpg"] * 65, "rank": [1] * 65}, "of at most 64"),
        (
            {"prompt": "x", "file_path": ["a.jpg", "c.jpg"], "human_preference": [1, 0]},
            "there is no image .*c.jpg.*--images",
        ),
        ({"prompt": "x", "image_path": ["a.jpg", "b.jpg"], "raw_annotations": [3]}, "must be objects, not 3"),
        (3, "has no 'prompt'"),
    ],
)
def test_malformed_rows(row, message, tmp_path):
    save_images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "train.json").write_text(json.dumps([row]))
    with pytest.raises((ValueError, FileNotFoundError), match=f"row 1 of .*{message}"):
        import_choices(tmp_path / "train.json", "hpdv2", tmp_path / "out")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (label_studio_task("middle"), "'selected' must be left or right, not 'middle'"),
        ({"data": {"image": "a.png"}, "annotations": []}, "no 'prompt', 'caption', 'text'"),
        ({"data": {"text": "a cat", "image": "a.png"}, "annotations": []}, "have 1 images, not two"),
        ({"data": {"text": "x", "a": "https://h.org/a.png", "b": "b.png"}, "annotations": []}, "not on this machine"),
        ({"data": [], "annotations": []}, "a task needs 'data'"),
        (label_studio_task(result="left"), "an annotation needs a list 'result'"),
        (label_studio_task() | {"annotations": [3]}, "an annotation needs a list 'result': 3"),
    ],
)
def test_malformed_tasks(task, message, tmp_path):
    save_images(tmp_path, "in here/a.png", "b.png")
    (tmp_path / "export.json").write_text(json.dumps([task]))
    with pytest.raises(ValueError, match=f"row 1 of .*{message}"):
        import_choices(tmp_path / "export.json", "label-studio", tmp_path / "out")


def test_damaged_parquet_files(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [pick_a_pic_row()])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.parquet is no Parquet file that can be read"):
        import_choices(path, "pick-a-pic", tmp_path / "out")
    write_parquet(path, [{"caption": "x"}])
    with pytest.raises(ValueError, match="has no column 'jpg_0'"):
        import_choices(path, "pick-a-pic", tmp_path / "out")
    write_parquet(path, [pick_a_pic_row(jpg_0=b"no image")])
    with pytest.raises(ValueError, match=r"row 1 of .*its jpg_0 is no image that can be read"):
        import_choices(path, "pick-a-pic", tmp_path / "out")
    write_parquet(path, [pick_a_pic_row(label_0=0.7)])
    with pytest.raises(ValueError, match=r"'label_0' must be 0, 0\.5 or 1"):
        import_choices(path, "pick-a-pic", tmp_path / "out")


def test_files_that_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_ROW_GROUP_BYTES", 100)
    path = write_parquet(tmp_path / "a.parquet", [pick_a_pic_row()])
    with pytest.raises(ValueError, match=r"a row group of .* bytes; at most 100 are read"):
        import_choices(path, "pick-a-pic", tmp_path / "out")
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    (tmp_path / "train.json").write_text(json.dumps([{"prompt": "x" * 200}]))
    with pytest.raises(ValueError, match="at most 100 are read"):
        import_choices(tmp_path / "train.json", "hpdv2", tmp_path / "out")


@pytest.mark.parametrize("name", PARQUET)
def test_without_pyarrow(name, choices, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [pick_a_pic_row()])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"^Parquet files need pyarrow: pip install 'dpok-gym\[parquet\]'$"):
        import_choices(path, name, tmp_path / "out")
    with pytest.raises(ImportError, match="need pyarrow"):
        export_choices(choices, name, tmp_path / "there")


def test_nothing_is_overwritten(choices, tmp_path):
    export_choices(choices, "hpdv2", tmp_path / "there")
    with pytest.raises(FileExistsError, match="is not empty; choose another one"):
        export_choices(choices, "hpdv2", tmp_path / "there")
    import_choices(tmp_path / "there", "hpdv2", tmp_path / "back")
    with pytest.raises(FileExistsError, match="exists already; choose another folder"):
        import_choices(tmp_path / "there", "hpdv2", tmp_path / "back")


def test_nothing_to_read_or_to_write(choices, tmp_path):
    with pytest.raises(ValueError, match="no choices that the format 'hpdv2' has"):
        export_choices(choices[3:], "hpdv2", tmp_path / "there")
    path = write_parquet(tmp_path / "a.parquet", [pick_a_pic_row(has_label=False)] * 3)
    with pytest.raises(
        ValueError, match="has no choices, but 3 without a label; check that its format is 'pick-a-pic'"
    ):
        import_choices(path, "pick-a-pic", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no \.parquet file"):
        import_choices(tmp_path / "empty", "pick-a-pic", tmp_path / "new")
    with pytest.raises(ValueError, match="the format must be"):
        import_choices(path, "argilla", Path("new"))
