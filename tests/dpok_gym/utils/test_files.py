"""Files that are either whole or not there."""

from pathlib import Path

import pytest

from dpok_gym.utils.files import replacing


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
