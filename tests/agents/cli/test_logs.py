"""The logs of a run: nothing is lost or doubled when a killed run is resumed."""

import builtins

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.cli.logs import CSVLog, TensorBoardLog, make_logger, read_log


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
    assert log.n_rows == 2
    assert read_log(tmp_path / "nothing.csv") == []


def test_a_log_goes_on_after_the_rows_of_a_checkpoint(tmp_path):
    path = tmp_path / "progress.csv"
    log = CSVLog(path)
    for k in range(4):
        _write(log, a=k)
    _write(log, a=4, late=1)  # the new column moves every byte after the first line
    with open(path, "a") as file:
        file.write("5,")  # the process was killed in the middle of a row
    log = CSVLog(path, n_rows=3)
    assert read_log(path) == [{"a": 0.0}, {"a": 1.0}, {"a": 2.0}]
    _write(log, a=3, late=7)
    assert read_log(path)[3] == {"a": 3.0, "late": 7.0}
    assert log.n_rows == 4
    log = CSVLog(path)  # from the beginning
    assert (read_log(path), log.n_rows) == ([], 0)
    _write(log, b=1)
    assert read_log(path) == [{"b": 1.0}]


def test_the_log_is_never_empty_while_it_is_cut(tmp_path, monkeypatch):
    path = tmp_path / "progress.csv"
    _write(CSVLog(path), a=1)
    opened, real = [], builtins.open

    def watch(file, mode="r", **kwargs):
        opened.append((str(file), mode))
        return real(file, mode, **kwargs)

    monkeypatch.setattr(builtins, "open", watch)
    _write(CSVLog(path, 1), a=2, b=3)
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
def test_tensorboard_goes_on(tmp_path, kept):
    log = TensorBoardLog(tmp_path / "tensorboard")
    for value in (1.0, 2.0, 3.0):
        _write(log, a=value)
    log.close()
    log = TensorBoardLog(tmp_path / "tensorboard", n_rows=kept)
    for value in (30.0, 40.0):
        _write(log, a=value)
    log.close()
    before = [(1, 1.0), (2, 2.0)][:kept]
    expected = [*before, (kept + 1, 30.0), (kept + 2, 40.0)]
    assert _tensorboard(tmp_path / "tensorboard", "a") == expected


@pytest.mark.slow
def test_tensorboard_goes_on_in_the_same_second(tmp_path):
    """Then the process's number would decide on the order of the files."""
    log = TensorBoardLog(tmp_path / "tensorboard")
    _write(log, a=1.0)
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    second, *rest = path.name.removeprefix("events.out.tfevents.").split(".")
    path.rename(path.with_name(".".join(["events.out.tfevents", second, "zzz", *rest])))  # sorts last
    log = TensorBoardLog(tmp_path / "tensorboard", n_rows=0)
    _write(log, a=2.0)
    log.close()
    assert _tensorboard(tmp_path / "tensorboard", "a") == [(1, 2.0)]


def test_the_logger_writes_both(tmp_path):
    logger = make_logger(tmp_path, CSVLog(tmp_path / "progress.csv"), TensorBoardLog(tmp_path / "tensorboard"))
    logger.record("train/loss", 0.25)
    logger.dump(10)
    logger.close()
    assert read_log(tmp_path / "progress.csv") == [{"train/loss": 0.25}]
    assert _tensorboard(tmp_path / "tensorboard", "train/loss") == [(1, 0.25)]
