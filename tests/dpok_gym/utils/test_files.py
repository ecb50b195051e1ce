"""Files that are either whole or not there."""

import errno
from pathlib import Path

import pytest

from dpok_gym.utils import files
from dpok_gym.utils.files import WriteError, locked, replacing, write_text


def test_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    with replacing(path) as part:
        assert part.parent == tmp_path  # on the same disk, so that the replacement is one operation
        part.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_file_is_there_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path: Path, error: type[BaseException]) -> None:
    with replacing(path) as part:
        part.write_text("ne")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interruption_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("old")
    with pytest.raises(error):
        write_half(path, error)
    assert path.read_text() == "old"
    with replacing(path) as part:  # what the interruption left behind is no obstacle
        part.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"
    flushed = []

    def note(place: Path) -> None:
        flushed.append((place.name, path.exists()))

    monkeypatch.setattr(files, "flush_to_disk", note)
    write_text(path, "new")
    assert flushed == [("log.csv.part", False), (tmp_path.name, True)]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which file it was and what is kept, and the part takes no space."""
    path = tmp_path / "log.csv"
    write_text(path, "old")

    def full(place: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "flush_to_disk", full)
    with pytest.raises(WriteError, match=r"log\.csv cannot be written: No space left on device; the old one is kept$"):
        write_text(path, "new")
    with pytest.raises(WriteError, match=r"other\.csv cannot be written: No space left on device$"):
        write_text(tmp_path / "other.csv", "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with locked(folder):
        with pytest.raises(WriteError, match=r"another process is writing to .*b; wait for its end"), locked(folder):
            pass
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]
    with locked(folder):
        pass


def test_a_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mistake"), locked(tmp_path / "a" / "b"):
        raise ValueError("mistake")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "c").mkdir()
    with locked(tmp_path / "c"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["c"]  # it was there before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/run cannot be written: Not a directory"), locked(tmp_path / "file/run"):
        pass
