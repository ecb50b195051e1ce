"""The logs of a run: nothing is lost or doubled when a killed run is resumed."""

import builtins
import errno

import numpy as np
import pytest
from stable_baselines3.common.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.cli.logs import CSVLog, TensorBoardLog, read_log
from dpok_gym.utils.files import WriteError


def _write(log, **values):
    log.write(values, dict.fromkeys(values))


def test_rows_are_read_back(tmp_path):
    log = CSVLog(tmp_path / "progress.csv")
    _write(log, a=1, b=np.float32(0.5))
    _write(log, b=float("nan"), c=0.1)
    rows = read_log(tmp_path / "progress.csv")
    assert rows[0] == {"a": 1.0, "b": 0.5}
    assert np.isnan(rows[1].pop("b"))
    assert rows[1] == {"c": 0.1}
    assert read_log(tmp_path / "nothing.csv") == []


@pytest.mark.parametrize(
    "content",
    [bytes(100), b"a,b\n1,two\n", b"\xff\xff", b"a,b\n1,2\n3,", b"a,b\n1,2\n3\n"],
    ids=["zeros", "a word", "no text", "cut off", "a short row"],
)
def test_a_damaged_log(tmp_path, content):
    (tmp_path / "progress.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"progress\.csv is damaged"):
        read_log(tmp_path / "progress.csv")


def test_a_log_goes_on(tmp_path):
    path = tmp_path / "progress.csv"
    for k in range(3):
        _write(CSVLog(path), a=k)
    _write(CSVLog(path), a=3, late=7)
    assert read_log(path) == [{"a": 0.0}, {"a": 1.0}, {"a": 2.0}, {"a": 3.0, "late": 7.0}]


def test_the_log_is_never_empty_while_a_column_is_added(tmp_path, monkeypatch):
    path = tmp_path / "progress.csv"
    _write(CSVLog(path), a=1)
    opened, real = [], builtins.open

    def watch(file, mode="r", **kwargs):
        opened.append((str(file), mode))
        return real(file, mode, **kwargs)

    monkeypatch.setattr(builtins, "open", watch)
    _write(CSVLog(path), a=2, b=3)
    assert not [mode for file, mode in opened if file == str(path) and "w" in mode]
    assert (str(path), "a") in opened
    monkeypatch.undo()
    assert read_log(path) == [{"a": 1.0}, {"a": 2.0, "b": 3.0}]


def test_excluded_values_are_left_out(tmp_path):
    log = CSVLog(tmp_path / "progress.csv")
    log.write({"a": 1, "b": 2}, {"a": ("csv",), "b": ("tensorboard",)})
    assert read_log(tmp_path / "progress.csv") == [{"b": 2.0}]


def _tensorboard(folder, name):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize("damaged", [False, True])
def test_tensorboard_is_made_anew(tmp_path, kept, damaged):
    """Whatever has happened to its files, it has the rows of the log and those that follow."""
    log = TensorBoardLog(tmp_path / "tensorboard")
    for value in (1.0, 2.0, 3.0):
        _write(log, a=value)
    log.close()
    if damaged:
        log.path.write_bytes(bytes(log.path.stat().st_size))
    log = TensorBoardLog(tmp_path / "tensorboard", [{"a": 1.0}, {"a": 2.0, "time/time_elapsed": 3.0}][:kept])
    for value in (30.0, 40.0):
        _write(log, a=value)
    log.close()
    before = [(1, 1.0), (2, 2.0)][:kept]
    expected = [*before, (kept + 1, 30.0), (kept + 2, 40.0)]
    assert _tensorboard(tmp_path / "tensorboard", "a") == expected
    assert list((tmp_path / "tensorboard").iterdir()) == [log.path]


@pytest.mark.slow
def test_the_times_of_older_points(tmp_path):
    log = TensorBoardLog(tmp_path, [{"a": 1.0, "time/time_elapsed": 10.0}, {"a": 2.0, "time/time_elapsed": 25.0}])
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    first, second = events.Scalars("a")
    assert second.wall_time - first.wall_time == pytest.approx(15.0, abs=1e-3)


@pytest.mark.parametrize("make", [lambda path: CSVLog(path), lambda path: TensorBoardLog(path)])
def test_a_full_disk(tmp_path, monkeypatch, make):
    """The message names the file, which Python's does not."""
    log = make(tmp_path / "log")
    _write(log, a=1)

    class Full:
        def __getattr__(self, name):
            raise OSError(errno.ENOSPC, "No space left on device")

        __enter__ = __exit__ = lambda self, *args: self.write

    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: Full())
    if isinstance(log, TensorBoardLog):
        log._records._writer = Full()
    with pytest.raises(WriteError, match=r"log.* cannot be written: No space left on device"):
        _write(log, a=2)


def test_the_logger_writes_both(tmp_path):
    logger = Logger(None, [CSVLog(tmp_path / "progress.csv"), TensorBoardLog(tmp_path / "tensorboard")])
    logger.record("train/loss", 0.25)
    logger.dump(10)
    logger.close()
    assert read_log(tmp_path / "progress.csv") == [{"train/loss": 0.25}]
    assert _tensorboard(tmp_path / "tensorboard", "train/loss") == [(1, 0.25)]
