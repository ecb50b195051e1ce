"""The table of the log's columns has all of them, and no others; test_contract.py compares it with real logs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import agents
from agents.common.metrics import METRICS, NAME
from agents.common.monitor import COLUMNS

#: Columns that Stable-Baselines3 itself writes.
OF_SB3 = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "time/fps",
    "time/iterations",
    "time/time_elapsed",
    "time/total_timesteps",
    "train/learning_rate",
}


def strings_in_the_code() -> Iterator[tuple[str, bool]]:
    """Yields each text in the learning side's code, and whether it is the first argument of ``record(...)``."""
    for path in Path(agents.__file__).parent.rglob("*.py"):
        if path.name in ("metrics.py", "monitor.py", "plots.py"):  # these read the log
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        recorded = {
            id(node.args[0])
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "record"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value, id(node) in recorded


def test_every_column_that_is_recorded_is_explained() -> None:
    recorded = {text for text, is_recorded in strings_in_the_code() if is_recorded}
    assert len(recorded) >= 10
    assert recorded <= METRICS.keys()


def test_every_explained_column_is_logged_by_something() -> None:
    texts = {text for text, _ in strings_in_the_code()}
    gone = [
        name
        for name in METRICS.keys() - OF_SB3
        if name not in texts and not name.endswith(NAME) and name.partition("/")[2] not in texts
    ]
    assert not gone


def test_the_monitor_reads_explained_columns() -> None:
    assert METRICS.keys() >= set(COLUMNS)


def test_every_entry_says_what_is_healthy() -> None:
    for name, metric in METRICS.items():
        assert metric.meaning.endswith("."), name
        assert metric.healthy.endswith("."), name
        assert metric.unit, name
