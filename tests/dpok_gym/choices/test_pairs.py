"""The folder of pairs, and pairs of images that are there already."""

import json
import shutil

import pytest
from PIL import Image

from dpok_gym.choices.pairs import (
    FILE_NAME,
    find_table,
    hash_file,
    import_images,
    is_complete,
    read_pairs,
    write_pairs,
)
from tests.dpok_gym.choices.support import make_pairs


@pytest.fixture
def source(tmp_path):
    """A folder of ten images of two prompts by two models, and its table."""
    folder = tmp_path / "source"
    folder.mkdir()
    lines = ["file,prompt,model"]
    for k in range(10):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / f"{k}.png")
        lines.append(f'{k}.png,"{"a dog, asleep" if k < 6 else "a cat"}",{"new" if k % 2 else "old"}')
    (folder / "prompts.csv").write_text("\n".join(lines) + "\n")
    return folder


def contents(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_pairs_come_back(tmp_path):
    pairs = make_pairs(tmp_path / "here", 3, "<b>é</b>", (None, "runs/a"))
    assert read_pairs(tmp_path / "here") == pairs
    moved = shutil.move(tmp_path / "here", tmp_path / "there")
    assert [pair.images[1].parent.parent for pair in read_pairs(moved)] == [moved] * 3


def test_a_folder_keeps_its_settings(tmp_path):
    pairs = make_pairs(tmp_path, 2)
    write_pairs(tmp_path, {"prompts": "x", "images": 4}, pairs)
    assert is_complete(tmp_path, {"prompts": "x", "images": 4})
    assert not is_complete(tmp_path, {"prompts": "x", "images": 6}, ["images"])
    for settings in ({"prompts": "y", "images": 4}, {"prompts": "x", "images": 2}, {"prompts": "x"}):
        with pytest.raises(ValueError, match=r"was begun with \w+ .*; choose another --out"):
            is_complete(tmp_path, settings, ["images"])
    assert not is_complete(tmp_path / "new", {})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"version": 2, "settings": {}, "pairs": []}',
        '{"version": 1, "settings": {}, "pairs": {}}',
        '{"version": 1, "settings": {}, "pairs": [1]}',
        '{"version": 1, "settings": {}, "pairs": [{"prompt": "x", "images": ["a.png"]}]}',
    ],
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ValueError, match=FILE_NAME):
        read_pairs(tmp_path)


def test_a_missing_image_is_named(tmp_path):
    pairs = make_pairs(tmp_path, 2)
    pairs[1].images[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"1a.png, which is not there"):
        read_pairs(tmp_path)


def test_images_that_are_there(source, tmp_path):
    out = tmp_path / "out"
    import_images(source, find_table(source), 0, out)
    pairs = read_pairs(out)
    assert [pair.number for pair in pairs] == list(range(5))
    assert sorted(pair.prompt for pair in pairs) == ["a cat"] * 2 + ["a dog, asleep"] * 3
    used = [digest for pair in pairs for digest in pair.sha256]
    assert len(set(used)) == 10
    for pair in pairs:
        # Half of each prompt's images are of each model, so every pair can compare the two.
        assert {origin["model"] for origin in pair.origins} == {"old", "new"}
        assert tuple(map(hash_file, pair.images)) == pair.sha256
    before = (out / FILE_NAME).read_bytes()
    import_images(source, source / "prompts.csv", 0, out)
    assert (out / FILE_NAME).read_bytes() == before
    with pytest.raises(ValueError, match="was begun with seed 0, and not 1"):
        import_images(source, source / "prompts.csv", 1, out)


def test_a_table_of_hugging_face_and_other_formats(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "train").mkdir(parents=True)
    rows = []
    for k, kind in enumerate(["PNG", "JPEG", "WEBP"]):
        Image.new("RGB", (8, 8), (200 * (k % 2), 0, 90 * k)).save(source / "train" / f"{k}.img", kind)
        rows.append(json.dumps({"file_name": f"train/{k}.img", "Text": "a dog"}) + "\n")
    (source / "metadata.jsonl").write_text("\n".join([*rows, rows[0]]))  # one image is listed twice
    import_images(source, find_table(source), 0, out)
    (pair,) = read_pairs(out)  # the third image is left over
    assert len(set(pair.sha256)) == 2
    assert all(image.suffix in (".png", ".jpeg", ".webp") for image in pair.images)
    assert all(Image.open(image).format == image.suffix[1:].upper() for image in pair.images)


def test_a_line_break_in_a_cell(source, tmp_path):
    table = source / "prompts.csv"
    prompts = {'"a red\nstar"': "a red\nstar", "a\u2028dog": "a\u2028dog"}
    images = sorted(source.glob("**/*.png"))
    rows = [f"{image.relative_to(source)},{prompt}" for prompt in prompts for image in images[:2]]
    table.write_text("\n".join(["file,prompt", *rows]), encoding="utf-8")
    import_images(source, table, 0, tmp_path / "out")
    assert {pair.prompt for pair in read_pairs(tmp_path / "out")} == set(prompts.values())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,prompt\n", "no prompt with two different images"),
        ("file,prompt\n0.png,a\n1.png,b\n", "no prompt with two different images"),
        ("file,prompt\n0.png,a\n", "no prompt with two"),
        ("picture,prompt\n0.png,a\n", "line 2 .*the column 'file' is missing"),
        ("file,prompt\n0.png,\n", "line 2 .*the column 'prompt' is missing or blank"),
        ("file,prompt\n0.png,a, b\n", "line 2 does not fit the columns"),
        ("file,prompt\n99.png,a\n", "there is no file .*99.png"),
        ("file,prompt\nprompts.csv,a\n", "prompts.csv cannot be read"),
        ("file,prompt\n../secret.png,a\n", "'../secret.png' lies outside"),
        ("file,prompt\n/etc/passwd,a\n", "lies outside"),
    ],
)
def test_bad_tables(source, tmp_path, table, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (source / "prompts.csv").write_text(table)
    before = contents(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        import_images(source, find_table(source), 0, tmp_path / "out")
    assert contents(tmp_path) == before


def test_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"add prompts.csv with the columns file and prompt"):
        find_table(tmp_path)
