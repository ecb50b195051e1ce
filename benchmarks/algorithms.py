"""The algorithms side by side, second edition: ``python -m benchmarks.algorithms``.

It has three parts, all described in ``algorithms.yaml``:

- ``--tune`` searches settings for each method, by the same rules (:mod:`benchmarks.tuning`), on prompts that no task
  has;
- the methods with these settings run on every task, with every seed;
- DPOK runs with one component changed at a time.

Each run is one line of ``runs.jsonl`` or ``tuning.jsonl``, so a sweep of many hours can stop anywhere, and the same
command goes on. Of a long run, at most five minutes are lost. ``--report`` makes no runs.
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

from benchmarks import algorithms_figures, algorithms_records, algorithms_tables, training_run
from benchmarks.algorithms_records import COMPONENT, LONG, PRETRAINED
from benchmarks.checksums import write_checksums
from benchmarks.figures import grid
from benchmarks.markdown import markdown
from benchmarks.over_optimisation import over_optimisation
from benchmarks.runs import (
    HERE,
    Description,
    Record,
    read_records,
    row_file,
    sweep,
    sweep_and_report,
    sweep_options,
)
from benchmarks.training_run import UNTRAINED, key_of, prompts_of_row
from benchmarks.tuning import Axis, Change, Outcome, search
from dpok_gym.utils.validation import check_integer

EXPLANATION = """\
# All tables of the comparison

### How to read the tables

- Means: plain ones over {n_seeds} seeds (of components over {n_components}), with 95 % bootstrap intervals within
  tasks. With five seeds these intervals are too narrow. If results had a normal distribution, an interval of one task
  would hold the true mean in 84 % of all cases, and one of six tasks in 90 %.
- Aligned: the share of images in which the judge finds nothing wrong. Alignment: the mean of the share of the prompt
  that an image fulfils; an image with one of two objects has a part of it. Quality: how clean the drawn shapes are,
  from 0 to 1.
- Gain: points of fully aligned images above the pre-trained model with the same seed, which is evaluated with the same
  noise. Gain on unseen prompts: of the tasks with one prompt. The pooled interquartile mean is that of the middle half
  of all runs of all tasks. The numbers in the table of kinds of prompts are gains, too.
- KL: of the trajectories, over the steps that explore, in nats per image. For the best of n images of the pre-trained
  model it is the bound log n - (n - 1) / n. Where images are drawn in another way, it is not known. Late drift: how far
  the outputs of the denoiser have moved at the last steps, which do not explore (root mean square).
- Positions: the entropy of the layouts that the judge sees in images of one prompt, if there are 16 images of each
  prompt. It falls if a model draws one layout again and again, but also if fewer images are wrong: compare it with that
  of the best of 8. Pixels: the mean distance of two images of one prompt.
- Reward minus judge: how much more the reward has risen than the judge's verdict, in standard deviations of an image of
  one prompt. The verdict is the alignment plus a fifth of the quality, so it cannot go above 1.2. The best of 4 or 8
  images of the pre-trained model are above 0, too: a choice by the reward also takes images that please the reward
  alone. Far above them, the reward is being hacked. There is no such number for the task “sparse”, where the reward is
  the judge itself.
- Passes: of the denoiser over one image; a backward pass counts as two. Reward calls: for one image that is kept.
  Seconds: of one core. Runs share the machine: of runs with the same work, the slowest took {seconds_median:.0f} % more
  seconds than the fastest (median), and up to {seconds_most:.0f} % more. So trust the passes, and not small differences
  in seconds.
- A run whose images became NaN counts as 0 aligned ones. It has no reward and no KL, so the means of these leave it
  out.
- Missing rows: a method that needs the reward's gradient has no runs where there is none. So it is left out of the
  tables over all tasks, and the tables over the tasks with a gradient have it. Three variants run on three tasks only,
  so only the tables of these tasks have them: DPOK as published, and the two without a KL, which are in the table of
  the paper's two claims, too.
- Tests: a difference is bold if a permutation test tells it from noise at 5 %, with Holm's correction for all
  comparisons of the table. In brackets is the smallest difference that so many runs would show in four of five cases,
  after the correction; without brackets, there are too few runs to show any. The test does not use that runs with the
  same seed are evaluated with the same noise. That makes it a little stricter.
- Equal costs: the alignment when a run had cost as much as the mean run of DPOK, or of DDPO. If a method costs no more,
  it counts with its final evaluation. That holds for all methods at equal images. At the passes of DPOK it does not
  hold for AWM, and on “flow” not for DiffusionNFT and the methods that fit a fixed set of images: there they cost 7 %
  more than DPOK. A run that is read earlier counts with the images that it was drawing. Its learning rate had not yet
  fallen to the end then.
- The paper's two claims: the first method minus the second one, at an equal reward. For each task there is one level of
  the reward, three quarters of the way from the pre-trained model's to the lower one that the two methods have in the
  end. A task is left out if the lower one has risen by less than a tenth of a standard deviation of an image, and
  “many” is, since each rollout has other prompts there. We look at the images of each run when it first reached this
  level; a run that never did is left out. The level is in standard deviations of an image, above the pre-trained
  model. “DPOK, no KL” and “SFT, no KL” were tuned again. “DPOK: no KL” has the settings of DPOK.
- Components: they keep the settings of DPOK, which were not tuned again.
- Long runs: the alignment on the way is a running mean over a twentieth of the run. A method that fits a fixed set of
  images draws them all before it learns, so it has none. The settings are those that were tuned for 512 images. Of the
  other ways to draw, a cell has the aligned images in %, and the quality.
- “DPOK, published” ends near the pre-trained model: its KL is below 0.2. Of the prices of the KL that the search tried,
  it had to choose a high one; the data sheet says why.
- Settings: in brackets is how far the reward is above that of the best other setting with three seeds. It is below 0
  where that one had broken a limit with the first seed, and so was no finalist. There are no brackets where all others
  with three seeds broke a limit. Rewards of one setting with two seeds differ by about 0.2: their standard deviation is
  0.12 in the first search and 0.18 in the second one.
"""

#: The models and the learned reward of the embedded worlds that the runs use.
WEIGHTS = sorted((HERE.parent / "dpok_gym" / "shapes").rglob("*.safetensors"))

#: What a setting loses that ruins the images: more than any reward can bring.
_RUINED = 1000.0

#: The batch for which "steps_per_image" counts: the default of the methods that fit a fixed set of images.
_BATCH = 64

#: The settings that a search has chosen, by the search and the method.
Tuned = Mapping[tuple[str, str], Change]


def main() -> None:
    """Makes the runs that are missing, and reports."""
    parser = sweep_options(__doc__, HERE / "algorithms.yaml")
    parser.add_argument("--tune", action="store_true", help="search the settings instead, and show what was tried")
    smaller = parser.add_argument_group("a smaller comparison", "without the components and the long runs")
    smaller.add_argument("--tasks", nargs="+", help="only these tasks")
    smaller.add_argument("--methods", nargs="+", help="only these methods, beside what needs no training")
    smaller.add_argument("--seeds", type=int, help="only so many seeds")
    options = parser.parse_args()
    settings = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    try:
        settings = choose(settings, options.tasks, options.methods, options.seeds)
    except ValueError as error:
        parser.error(str(error))
    folder = options.out or HERE / "results" / "algorithms"
    tuning = Tuning(settings, folder / "tuning.jsonl")
    if options.tune:
        while not options.report and (missing := tuning.missing()):
            sweep(missing, tuning.file, options.processes, images=False)
        tuning.show()
        return
    runs = list(descriptions(settings, tuning.tuned()))
    write = partial(report, settings=settings, folder=folder, tuning=tuning)
    run = partial(training_run.run, unfinished=folder / "unfinished")
    sweep_and_report(runs, folder / "runs.jsonl", options, write, run=run)


# ---------------------------------------------------------------------------------------------------------------- runs


def choose(
    settings: dict[str, Any],
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
) -> dict[str, Any]:
    """Returns the settings of a smaller comparison, which has no components and no long runs; its runs are the same.

    Args:
        settings: as in ``algorithms.yaml``.
        tasks: names of the tasks; None for all.
        methods: names of the methods; None for all.
        seeds: number of seeds, at least 1; None for all.

    Raises:
        ValueError: if there is no such task or method, or no seed.
    """
    if tasks is None and methods is None and seeds is None:
        return settings
    smaller = settings | {"seeds": settings["seeds"] if seeds is None else check_integer("seeds", seeds)}
    for part, names in (("tasks", tasks), ("methods", methods)):
        chosen = list(settings[part]) if names is None else names
        if unknown := [name for name in chosen if name not in settings[part]]:
            raise ValueError(f"there are no {part} {', '.join(unknown)}; there are {', '.join(settings[part])}")
        smaller[part] = {name: value for name, value in settings[part].items() if name in chosen}
    searches = settings["tuning"]["searches"]
    last = max(list(searches).index(task["tuning"]) for task in smaller["tasks"].values())
    smaller["tuning"] = settings["tuning"] | {"searches": dict(list(searches.items())[: last + 1])}  # one needs another
    labels = list(smaller["methods"])
    shown = {"yardsticks": labels[:2], "tasks": list(smaller["tasks"])[:2], "labels": labels}
    families = ([label for label in family if label in labels] for family in settings["shown"]["families"])
    shown["families"] = [family for family in families if family]
    smaller["shown"] = shown | {"short": [*labels, PRETRAINED]}
    for part in ("components", "long"):
        smaller[part] = settings[part] | {"seeds": 0}
    return smaller


def descriptions(settings: dict[str, Any], tuned: Tuned) -> Iterator[Description]:
    """Yields the descriptions of the runs: seed after seed, and the long ones at the end.

    Args:
        settings: as in ``algorithms.yaml``.
        tuned: what the searches have chosen.
    """
    components, long = settings["components"], settings["long"]
    for seed in range(settings["seeds"]):
        for task in settings["tasks"]:
            for label, draw in settings["untrained"].items():
                yield describe_untrained(settings, task, label, draw, seed)
            for label in methods_of(settings, task):
                also = {name: value for name, value in settings["methods"][label].items() if name == "also"}
                yield describe(settings, task, label, seed, tuned) | also
            if seed < components["seeds"] and task in components["tasks"]:
                for change_label, change in components["changes"].items():
                    run = describe(settings, task, "DPOK", seed, tuned)
                    yield run | {"label": f"{COMPONENT}{change_label}", "settings": run["settings"] | change}
    for seed in range(long["seeds"]):
        for label in methods_of(settings, long["task"]):
            if label not in long["without"]:
                run = describe(settings, long["task"], label, seed, tuned, long["images"])
                yield run | {"task": LONG, "also": long["also"]}


def methods_of(settings: dict[str, Any], task: str) -> list[str]:
    """Returns the methods that run on a task: without those that need a gradient which its reward has not."""
    has_gradient = settings["tasks"][task].get("gradient", True)
    return [
        label
        for label, method in settings["methods"].items()
        if task in method.get("tasks", [task]) and (has_gradient or "needs_gradient" not in method)
    ]


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
    search = of_task.pop("tuning")
    return _complete(settings, of_task, search, label, seed, tuned[search, label], images) | {"task": task}


def describe_untrained(settings: dict[str, Any], task: str, label: str, draw: dict[str, Any], seed: int) -> Description:
    """Returns the description of images of the pre-trained model, drawn in some way."""
    no_drawing = ("tuning", "settings", "gradient")
    of_task = {name: value for name, value in settings["tasks"][task].items() if name not in no_drawing}
    run = {"task": task, "label": label, "algorithm": UNTRAINED, "seed": seed, "settings": {}, "draw": draw}
    return settings["common"] | of_task | run


def _complete(
    settings: dict[str, Any],
    of_task: dict[str, Any],
    search: str,
    label: str,
    seed: int,
    change: Change,
    images: int | None = None,
) -> Description:
    """Returns a description with all settings of a method, but for the name of its task."""
    method = settings["methods"][label]
    own = settings["settings"] | of_task.get("settings", {}) | method["settings"]
    own |= method.get("by_search", {}).get(search, {}) | change
    of_task = {name: value for name, value in of_task.items() if name not in ("settings", "gradient")}
    run = settings["common"] | of_task | {"label": label, "algorithm": method["algorithm"], "seed": seed}
    run["images"] = images or run["images"]
    if "steps_per_image" in method:  # of 64 images: as many images, whatever the size of a batch is
        steps = method["steps_per_image"] * run["images"] * _BATCH / own.get("batch_size", _BATCH)
        own = own | {"n_gradient_steps": round(steps)}
    return run | {"settings": own}


def report(records: Sequence[Record], settings: dict[str, Any], folder: Path, tuning: Tuning) -> None:
    """Writes the tables, and draws the figures.

    Args:
        records: of the runs.
        settings: as in ``algorithms.yaml``.
        folder: for the files; it has the rows of images already.
        tuning: has chosen the settings.
    """
    records = in_order(records, settings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(make_text(records, settings, tuning), encoding="utf-8")
    write_checksums([*WEIGHTS, *(folder / name for name in ("runs.jsonl", "tuning.jsonl"))], folder / "SHA256SUMS")
    trained, untrained = algorithms_records.trained_labels(records), algorithms_records.untrained_labels(records)
    tasks = [task for task in settings["tasks"] if any(record["task"] == task for record in records)]
    algorithms_figures.gains(records, tasks, [*trained, *untrained], folder / "gains.png")
    if trained:
        algorithms_figures.frontier(records, tasks, trained, folder / "frontier.png")
        algorithms_figures.costs(records, settings["shown"]["tasks"], settings["shown"]["labels"], folder / "costs.png")
        if settings["shown"]["families"]:
            algorithms_figures.curves(records, tasks, settings["shown"]["families"], folder / "curves.png")
    if any(record["task"] == LONG for record in records):
        over_optimisation(records, trained, folder / "over_optimisation.png")
    for task in (*settings["shown"]["tasks"], LONG):
        of_task = [record for record in records if record["task"] == task]
        if of_task:
            files = {label: row_file(folder, task, label) for label in settings["shown"]["labels"]}
            of_before = settings["long"]["task"] if task == LONG else task  # a long run begins as that task does
            files = {PRETRAINED: row_file(folder, of_before, PRETRAINED)} | files
            grid(files, task, prompts_of_row(of_task[0]), folder / f"grid-{task}.png")
    print(f"all tables and figures: {folder}")


def in_order(records: Sequence[Record], settings: dict[str, Any]) -> list[Record]:
    """Returns the records in the order of their methods in the settings."""
    order = [*settings["methods"], *settings["untrained"]]
    return sorted(records, key=lambda record: order.index(record["label"].partition(": ")[0]))


def make_text(records: Sequence[Record], settings: dict[str, Any], tuning: Tuning) -> str:
    """Returns all tables in Markdown, with what they mean.

    Args:
        records: of the runs, see :func:`in_order`.
        settings: as in ``algorithms.yaml``.
        tuning: has chosen the settings.
    """
    n_seeds = len({record["seed"] for record in records})
    median_spread, most_spread = algorithms_records.spread_of_seconds(records)
    text = EXPLANATION.format(
        n_seeds=n_seeds,
        n_components=settings["components"]["seeds"],
        seconds_median=100 * median_spread,
        seconds_most=100 * most_spread,
    )
    tables = algorithms_tables.all_tables(records, settings) | {"Settings that were chosen": tuning.table()}
    return text + "".join(f"\n### {title}\n\n{table}" for title, table in tables.items())


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
        self._outcomes: dict[tuple[str, str], Outcome] = {}
        self._read()

    def missing(self) -> list[Description]:
        """Returns the descriptions of the runs that the searches need next; none if they are over."""
        self._read()
        for name in self._searches:  # one after the other, as the second builds upon the first
            needed = [self._describe_pretrained(name, seed) for seed in self._rules["seeds"]]
            for label in self._labels(name):
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
            for label in self._labels(name):
                chosen[name, label] = self._start(name, label) | (self._outcome(name, label).best or {})
        return chosen

    def show(self) -> None:
        """Prints what was tried for each method, the best first."""
        columns = {"reward": ".3f", "aligned": ".2f", "quality": ".3f", "kl": ".1f"}
        for name in self._searches:
            table = Table("", "settings", "seeds", "rank", *columns, "chosen", title=f"search “{name}”")
            for label in self._labels(name):
                outcome = self._outcome(name, label)
                tried = self._tried(name, label).items()
                for words, records in sorted(tried, key=lambda pair: -self._rank(pair[1])):
                    means = [mean_score(records, column) for column in columns]
                    cells = [format(value, form) for value, form in zip(means, columns.values(), strict=True)]
                    is_chosen = outcome.best is not None and words == _written(outcome.best)
                    rank = f"{self._rank(records):.3f}"
                    chosen = f"yes{self._marks(name, label)}" if is_chosen else ""
                    table.add_row(label, words, str(len(records)), rank, *cells, chosen)
                table.add_section()
            Console(width=160).print(table)

    def table(self) -> str:
        """Returns the settings that the searches have chosen, and how far they are ahead, in Markdown."""
        rows: dict[str, list[str]] = {}
        for label in self._settings["methods"]:
            cells, n_tried = [], 0
            for name in self._searches:
                if label in self._labels(name):
                    best, tried = self._outcome(name, label).best, self._tried(name, label)
                    cells.append(_written(best or {}) + self._marks(name, label) + self._lead(name, label))
                    n_tried += len(tried)
                else:
                    cells.append("")
            rows[label] = [*cells, str(n_tried)]
        return markdown(rows, [*(f"search “{name}”" for name in self._searches), "settings tried"])

    def _marks(self, name: str, label: str) -> str:
        """Returns which chosen values are at an end of their grid, or at a limit that the grid may not pass."""
        outcome = self._outcome(name, label)
        best = outcome.best or {}
        limited = [axis.name for axis in self._axes(name, label) if best.get(axis.name) in axis.limits]
        marks = [f", {axis} at the edge" for axis in outcome.at_edge]
        return "".join([*marks, *(f", {axis} at its limit" for axis in limited)])

    def _lead(self, name: str, label: str) -> str:
        """Returns how far the chosen setting is above the best other one with as many seeds that keeps the limits.

        It is below 0 if the other one was no finalist, as it had broken a limit with the first seed.
        """
        best, seeds = self._outcome(name, label).best, self._rules["seeds"]
        if best is None:
            return ""
        ranks = {words: self._rank(runs) for words, runs in self._tried(name, label).items() if len(runs) == len(seeds)}
        others = [rank for words, rank in ranks.items() if words != _written(best) and rank > -_RUINED / 2]
        return f" ({ranks[_written(best)] - max(others):+.3f})" if others else ""

    def _tried(self, name: str, label: str) -> dict[str, list[Record]]:
        """Returns the runs of a search for a method, by what it tried."""
        tried: dict[str, list[Record]] = {}
        start = self._start(name, label).items()
        for record in self._records.values():
            # A later search may have begun before the first one was widened, from what that one had chosen then.
            if (record["task"], record["label"]) == (name, label) and start <= record["settings"].items():
                change = {axis.name: record["settings"][axis.name] for axis in self._axes(name, label)}
                tried.setdefault(_written(change), []).append(record)
        return tried

    def _read(self) -> None:
        self._records = {key_of(record): record for record in read_records(self.file)}
        self._outcomes.clear()

    def _labels(self, name: str) -> list[str]:
        """Returns the methods that run on a task for which a search counts; a later search builds upon the first."""
        of_searches = list(self._searches)[list(self._searches).index(name) :]
        tasks = [task for task, value in self._settings["tasks"].items() if value["tuning"] in of_searches]
        return [
            label
            for label in self._settings["methods"]
            if any(label in methods_of(self._settings, task) for task in tasks)
        ]

    def _axes(self, name: str, label: str) -> list[Axis]:
        """Returns the settings that a search tries for a method."""
        chosen = self._searches[name].get("axes")
        method, most = self._settings["methods"][label], self._rules["most"]
        limits = method.get("limits", {})
        return [
            Axis(axis, values, most, tuple(limits.get(axis, (0, math.inf))))
            for axis, values in method["axes"].items()
            if chosen is None or axis in chosen
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
        # The runs of a later search ask for that of the first one again and again.
        if (name, label) not in self._outcomes:
            self._outcomes[name, label] = self._search(name, label)
        return self._outcomes[name, label]

    def _search(self, name: str, label: str) -> Outcome:
        def run_of(change: Change, seed: int) -> Record | None:
            return self._records.get(key_of(self._describe(name, label, change, seed)))

        rules = self._rules
        return search(self._axes(name, label), run_of, self._rank, rules["seeds"], rules["finalists"], -_RUINED / 2)

    def _describe(self, name: str, label: str, change: Change, seed: int) -> Description:
        of_search = {key: value for key, value in self._searches[name].items() if key != "axes"}
        run = _complete(self._of_tuning(), of_search, name, label, seed, self._start(name, label) | change)
        return run | {"task": name}

    def _describe_pretrained(self, name: str, seed: int) -> Description:
        of_search = {key: value for key, value in self._searches[name].items() if key not in ("axes", "settings")}
        run = {"task": name, "label": PRETRAINED, "algorithm": UNTRAINED, "settings": {}, "draw": {}}
        return self._of_tuning()["common"] | of_search | run | {"seed": seed}

    def _of_tuning(self) -> dict[str, Any]:
        """Returns the settings, with the budget of the tuning."""
        budget = {name: self._rules[name] for name in ("images", "eval_images")} | {"held_out": False}
        return self._settings | {"common": self._settings["common"] | budget}

    def _rank(self, records: Sequence[Record]) -> float:
        """Returns the mean reward of the runs of a setting; one that ruins the images is below all others."""
        if any("diverged" in record for record in records):
            return -math.inf
        if any(record["scores"]["training"]["kl"] == 0 for record in records):  # it went back to where it began
            return -math.inf
        pretrained = [self._describe_pretrained(record["task"], record["seed"]) for record in records]
        before = [self._records[key_of(run)] for run in pretrained if key_of(run) in self._records]
        shortfall = 0.0
        for name, factor in self._rules["limits"].items() if before else ():
            shortfall += max(0.0, factor * mean_score(before, name) - mean_score(records, name))
        return mean_score(records, "reward") - (_RUINED * (1 + shortfall) if shortfall else 0)


def mean_score(records: Sequence[Record], name: str) -> float:
    """Returns the mean of a score over runs, for the prompts of the training; NaN if one has none."""
    return fmean(record["scores"].get("training", {}).get(name, math.nan) for record in records)


def _written(change: Change) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in change.items())


if __name__ == "__main__":
    main()
