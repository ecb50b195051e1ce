"""The algorithms side by side, second edition: ``python -m benchmarks.algorithms``.

It has three parts, all described in ``algorithms.yaml``:

- ``--tune`` searches settings for each method, by the same rules (:mod:`benchmarks.tuning`), on prompts that no task
  has;
- the methods with these settings run on every task, with every seed;
- DPOK runs with one component changed at a time.

Each run is one line of ``runs.jsonl`` or ``tuning.jsonl``, so a sweep of many hours can stop anywhere, and the same
command goes on. ``--report`` makes no runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import algorithms_figures, algorithms_tables
from benchmarks.algorithms_tables import COMPONENT, LONG, PRETRAINED
from benchmarks.compare import HERE
from benchmarks.over_optimisation import over_optimisation
from benchmarks.runs import Description, Record, key_of, read_records, sweep, sweep_and_report, sweep_options
from benchmarks.training_run import UNTRAINED
from benchmarks.tuning import Axis, Change, Outcome, search

EXPLANATION = """\
Plain means over {n_seeds} seeds, with 95 % bootstrap intervals within tasks. Gain: points of fully aligned images above
the pre-trained model. The pooled interquartile mean is that of the middle half of all runs of all tasks. KL: of the
trajectories, in nats per image; for images of the pre-trained model that are chosen among n, the bound
log n - (n - 1) / n. Positions: the entropy of the layouts that the judge sees in images of one prompt. Pixels: the mean
distance of two images of one prompt. Reward minus judge: how much more the reward has risen than what the judge says,
in standard deviations of an image; above 0, the reward is being hacked. Passes: of the denoiser over one image; a
backward pass counts as two. Seconds: of one core.

In the table of pairs, a difference is bold if a permutation test tells it from noise at 5 %, with Holm's correction for
all pairs; in brackets is the smallest difference that so many runs would show in four of five comparisons. At equal
costs: alignment of the images that are drawn in training, when the cheapest method has finished. At equal reward: when
the images of the training first had the highest reward that all four methods reach.
"""

#: What a run loses that ruins the images: more than any reward can bring.
_RUINED = 1000.0

#: The settings that a search has chosen, by the search and the method.
Tuned = Mapping[tuple[str, str], Change]


def main() -> None:
    """Makes the runs that are missing, and reports."""
    parser = sweep_options(__doc__, HERE / "algorithms.yaml")
    parser.add_argument("--tune", action="store_true", help="search the settings instead, and show what was tried")
    options = parser.parse_args()
    settings = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    folder = options.out or HERE / "results" / "algorithms"
    tuning = Tuning(settings, folder / "tuning.jsonl")
    if options.tune:
        while not options.report and (missing := tuning.missing()):
            sweep(missing, tuning.file, options.processes, images=False)
        tuning.show()
        return
    runs = list(descriptions(settings, tuning.tuned()))
    write = partial(report, settings=settings, folder=folder)
    sweep_and_report(runs, folder / "runs.jsonl", options, write)


# ---------------------------------------------------------------------------------------------------------------- runs


def descriptions(settings: dict[str, Any], tuned: Tuned) -> Iterator[Description]:
    """Yields the descriptions of the runs: those of the first seed first, and the long ones in the end.

    Args:
        settings: as in ``algorithms.yaml``.
        tuned: what the searches have chosen.
    """
    components, long = settings["components"], settings["long"]
    for seed in range(settings["seeds"]):
        for task in settings["tasks"]:
            for label, draw in settings["untrained"].items():
                yield describe_untrained(settings, task, label, draw, seed)
            for label, method in settings["methods"].items():
                also = {"also": method["also"]} if "also" in method else {}
                yield describe(settings, task, label, seed, tuned) | also
            if seed < components["seeds"] and task in components["tasks"]:
                for change_label, change in components["changes"].items():
                    run = describe(settings, task, "DPOK", seed, tuned)
                    yield run | {"label": f"{COMPONENT}{change_label}", "settings": run["settings"] | change}
    for seed in range(long["seeds"]):
        for label in settings["methods"]:
            run = describe(settings, long["task"], label, seed, tuned, long["images"])
            yield run | {"task": LONG}


def describe(
    settings: dict[str, Any], task: str, label: str, seed: int, tuned: Tuned, images: int | None = None
) -> Description:
    """Returns the description of one run of a method.

    Args:
        settings: as in ``algorithms.yaml``.
        task: a name of its tasks.
        label: a name of its methods.
        seed: of the run.
        tuned: what the searches have chosen.
        images: other budget than the task's.
    """
    of_task = dict(settings["tasks"][task])
    change = tuned[of_task.pop("tuning"), label]
    return _complete(settings, of_task, label, seed, change, images) | {"task": task}


def describe_untrained(settings: dict[str, Any], task: str, label: str, draw: dict[str, Any], seed: int) -> Description:
    """Returns the description of images of the pre-trained model, drawn in some way."""
    of_task = {name: value for name, value in settings["tasks"][task].items() if name not in ("tuning", "settings")}
    run = {"task": task, "label": label, "algorithm": UNTRAINED, "seed": seed, "settings": {}, "draw": draw}
    return settings["common"] | of_task | run


def _complete(
    settings: dict[str, Any],
    of_task: dict[str, Any],
    label: str,
    seed: int,
    change: Change,
    images: int | None = None,
) -> Description:
    """Returns a description with all settings of a method, but for the name of its task."""
    method, of_task = settings["methods"][label], dict(of_task)
    own = settings["settings"] | of_task.pop("settings", {}) | method["settings"] | change
    run = settings["common"] | of_task | {"label": label, "algorithm": method["algorithm"], "seed": seed}
    run["images"] = images or run["images"]
    if "steps_per_image" in method:
        own = own | {"n_gradient_steps": round(method["steps_per_image"] * run["images"])}
    return run | {"settings": own}


def report(records: Sequence[Record], settings: dict[str, Any], folder: Path) -> None:
    """Writes and prints the tables, and draws the figures.

    Args:
        records: of the runs.
        settings: as in ``algorithms.yaml``.
        folder: for the files; it has the rows of images.
    """
    order = [*settings["methods"], *settings["untrained"]]
    records = sorted(records, key=lambda record: order.index(record["label"].partition(": ")[0]))
    seeds = sorted({record["seed"] for record in records})
    text = EXPLANATION.format(n_seeds=len(seeds))
    tables = algorithms_tables.all_tables(records, settings)
    for title, table in tables.items():
        text += f"\n### {title}\n\n{table}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    trained, untrained = algorithms_tables.trained_labels(records), algorithms_tables.untrained_labels(records)
    tasks = [task for task in settings["tasks"] if any(record["task"] == task for record in records)]
    algorithms_figures.gains(records, tasks, [*trained, *untrained], folder / "gains.png")
    algorithms_figures.frontier(records, tasks, trained, folder / "frontier.png")
    algorithms_figures.costs(records, settings["shown"]["tasks"], settings["shown"]["labels"], folder / "costs.png")
    if any(record["task"] == LONG for record in records):
        over_optimisation(records, trained, folder / "over_optimisation.png")
    print(f"{next(iter(tables.values()))}\nall tables and figures: {folder}")


# -------------------------------------------------------------------------------------------------------------- tuning


class Tuning:
    """The searches of all methods, from the runs that are in a file.

    Args:
        settings: as in ``algorithms.yaml``.
        file: the runs.
    """

    def __init__(self, settings: dict[str, Any], file: Path) -> None:
        self.file = file
        self._settings, self._rules = settings, settings["tuning"]
        self._searches: dict[str, dict[str, Any]] = self._rules["searches"]
        self._records: dict[str, Record] = {}
        self._read()

    def missing(self) -> list[Description]:
        """Returns the descriptions of the runs that the searches need next; none if they are over."""
        self._read()
        for name in self._searches:  # one after the other, as the second builds upon the first
            needed = [self._describe_pretrained(name)]
            for label in self._settings["methods"]:
                needed += [self._describe(name, label, *trial) for trial in self._outcome(name, label).missing]
            needed = [run for run in needed if key_of(run) not in self._records]
            if needed:
                return needed
        return []

    def tuned(self) -> dict[tuple[str, str], Change]:
        """Returns what the searches have chosen.

        Raises:
            ValueError: if a search is not over.
        """
        if self.missing():
            raise ValueError("the searches for settings are not over: run the command with --tune first")
        chosen = {}
        for name in self._searches:
            for label in self._settings["methods"]:
                chosen[name, label] = self._start(name, label) | (self._outcome(name, label).best or {})
        return chosen

    def show(self) -> None:
        """Prints what was tried for each method, the best first."""
        columns = {"reward": ".3f", "aligned": ".2f", "quality": ".3f", "kl": ".1f"}
        for name in self._searches:
            table = Table("", "settings", "seeds", "score", *columns, "chosen", title=f"search “{name}”")
            for label in self._settings["methods"]:
                outcome = self._outcome(name, label)
                tried: dict[str, list[Record]] = {}
                for record in self._records.values():
                    if (record["task"], record["label"]) == (name, label):
                        change = {axis.name: record["settings"][axis.name] for axis in self._axes(name, label)}
                        tried.setdefault(_written(change), []).append(record)
                for words, records in sorted(tried.items(), key=lambda pair: -self._mean_score(pair[1])):
                    means = [fmean(record["scores"]["training"][column] for record in records) for column in columns]
                    cells = [format(value, form) for value, form in zip(means, columns.values(), strict=True)]
                    is_chosen = outcome.best is not None and words == _written(outcome.best)
                    edges = "".join(f", {axis} at the edge" for axis in outcome.at_edge)
                    score = f"{self._mean_score(records):.3f}"
                    table.add_row(label, words, str(len(records)), score, *cells, f"yes{edges}" if is_chosen else "")
                table.add_section()
            Console(width=160).print(table)

    def _read(self) -> None:
        self._records = {key_of(record): record for record in read_records(self.file)}

    def _axes(self, name: str, label: str) -> list[Axis]:
        """Returns the settings that a search tries for a method."""
        chosen = self._searches[name].get("axes")
        axes = self._settings["methods"][label]["axes"]
        return [
            Axis(axis, values, self._rules["most"]) for axis, values in axes.items() if chosen is None or axis in chosen
        ]

    def _start(self, name: str, label: str) -> Change:
        """Returns what the first search has chosen for the settings that a later one does not try."""
        first = next(iter(self._searches))
        if name == first:
            return {}
        own = [axis.name for axis in self._axes(name, label)]
        best = self._outcome(first, label).best or {}
        return {axis: value for axis, value in best.items() if axis not in own}

    def _outcome(self, name: str, label: str) -> Outcome:
        def score(change: Change, seed: int) -> float | None:
            record = self._records.get(key_of(self._describe(name, label, change, seed)))
            return None if record is None else self._score(record)

        return search(self._axes(name, label), score, self._rules["seeds"], self._rules["finalists"])

    def _describe(self, name: str, label: str, change: Change, seed: int) -> Description:
        of_search = {key: value for key, value in self._searches[name].items() if key != "axes"}
        run = _complete(self._of_tuning(), of_search, label, seed, self._start(name, label) | change)
        return run | {"task": name}

    def _describe_pretrained(self, name: str) -> Description:
        of_search = {key: value for key, value in self._searches[name].items() if key not in ("axes", "settings")}
        run = {"task": name, "label": PRETRAINED, "algorithm": UNTRAINED, "settings": {}, "draw": {}}
        return self._of_tuning()["common"] | of_search | run | {"seed": self._rules["seeds"][0]}

    def _of_tuning(self) -> dict[str, Any]:
        """Returns the settings, with the budget of the tuning."""
        budget = {name: self._rules[name] for name in ("images", "eval_images")} | {"held_out": False}
        return self._settings | {"common": self._settings["common"] | budget}

    def _score(self, record: Record) -> float:
        """Returns the reward of a run; a run that ruins the images is below all others."""
        before = self._records.get(key_of(self._describe_pretrained(record["task"])))
        scores = record["scores"]["training"]
        lowest = -math.inf if before is None else before["scores"]["training"]["quality"] - self._rules["quality_loss"]
        shortfall = max(0.0, lowest - scores["quality"])
        return scores["reward"] - (_RUINED * (1 + shortfall) if shortfall else 0)

    def _mean_score(self, records: Sequence[Record]) -> float:
        return fmean(self._score(record) for record in records)


def _written(change: Change) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in change.items())


if __name__ == "__main__":
    main()
