"""Which exploration noise is best for a flow-matching model: ``python -m benchmarks.flow_noise``.

The embedded flow-matching model draws with each kernel and noise level of ``flow_noise.yaml``, before training and
after the same number of images of DPOK. Before training the noise costs image quality, beside the sampler without noise
("ode"). In training it is what there is to learn from. One seed is made again with a smaller learning rate. The runs
are kept, see :mod:`benchmarks.runs`; ``--report`` makes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.figures import save, tidy
from benchmarks.markdown import markdown
from benchmarks.runs import HERE, Description, Record, sweep_and_report, sweep_options
from benchmarks.statistics import Interval, mean
from benchmarks.training_run import UNTRAINED

BEFORE, AFTER, SLOWER = "before", "after", "slower"
#: The columns of a table: heading, when the score is taken, its name, its format.
COLUMNS = {
    "before: aligned": (BEFORE, "aligned", ".3f"),
    "before: quality": (BEFORE, "quality", ".3f"),
    "before: reward": (BEFORE, "reward", ".2f"),
    "after: aligned": (AFTER, "aligned", ".3f"),
    "after: quality": (AFTER, "quality", ".3f"),
    "after: reward": (AFTER, "reward", ".2f"),
    "after: KL, nats": (AFTER, "kl", ".1f"),
    "smaller rate: aligned": (SLOWER, "aligned", ".3f"),
    "smaller rate: KL, nats": (SLOWER, "kl", ".1f"),
}

#: The panels of the figure, one for each score.
PANELS = {"reward": "reward trained on", "aligned": "share fully aligned", "quality": "quality"}

#: The means of the columns of a kernel and noise level, by its label.
Rows = dict[str, dict[str, Interval]]


def main() -> None:
    """Makes the runs that are missing, and reports."""
    options = sweep_options(__doc__, HERE / "flow_noise.yaml").parse_args()
    settings = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    folder = options.out or HERE / "results" / "flow_noise"
    runs = list(descriptions(settings))
    sweep_and_report(
        runs, folder / "runs.jsonl", options, partial(report, settings=settings, folder=folder), images=False
    )


def descriptions(settings: dict[str, Any]) -> Iterator[Description]:
    """Yields the descriptions of the runs of ``flow_noise.yaml``, those of the first seed first."""
    for seed in range(settings["seeds"]):
        for n_steps in settings["steps"]:
            for sampler, etas in settings["samplers"].items():
                for eta in etas:
                    environment = {"model": "shapes-flow", "sampler": sampler, "eta": eta}
                    run = {"num_inference_steps": n_steps, "environment": environment, "seed": seed}
                    run = settings["common"] | run | {"task": f"{n_steps} steps", "label": label(sampler, eta)}
                    yield run | {"algorithm": UNTRAINED, "settings": {}}
                    if sampler == "ode":
                        continue
                    run |= {"algorithm": settings["algorithm"], "settings": settings["settings"]}
                    yield run
                    slower = settings["slower"]
                    if seed < slower["seeds"] and n_steps in slower["steps"]:
                        yield run | {"settings": run["settings"] | {"learning_rate": slower["learning_rate"]}}


def label(sampler: str, eta: float) -> str:
    """Returns what a kernel with a noise level is called."""
    return sampler if sampler == "ode" else f"{sampler}, {eta:g}"


def report(records: Sequence[Record], settings: dict[str, Any], folder: Path) -> None:
    """Writes and prints a table for each number of steps, and draws the figure.

    Args:
        records: of the runs.
        settings: those of ``flow_noise.yaml``.
        folder: for the files.
    """
    rate = settings["settings"]["learning_rate"]
    tables = {
        n_steps: make_rows(records, n_steps, rate) for n_steps in sorted({r["num_inference_steps"] for r in records})
    }
    console, texts = Console(width=180), []
    for n_steps, rows in tables.items():
        table = Table("", *COLUMNS, title=f"{n_steps} steps")
        cells = {name: [_format(means, heading) for heading in COLUMNS] for name, means in rows.items()}
        for name, row in cells.items():
            table.add_row(name, *row)
        console.print(table)
        texts.append(f"## {n_steps} steps\n\n{markdown(cells, COLUMNS)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text("\n".join(texts), encoding="utf-8")
    seeds, first = len({record["seed"] for record in records}), records[0]
    title = (
        f"“{first['prompts']}”, before and after {first['images']} images of DPOK. Numbers: noise level.\n"
        f"Bars: 95 % intervals of {seeds} seeds. Grey: training changes nothing. Dotted: no noise, before training."
    )
    figure(tables, title, folder / "flow_noise.png")


def make_rows(records: Sequence[Record], n_steps: int, learning_rate: float) -> Rows:
    """Returns the means over the seeds of each column; those without runs are left out.

    Args:
        records: of the runs.
        n_steps: the number of denoising steps whose runs count.
        learning_rate: the tuned one; runs with another are those of the smaller rate.
    """
    rows: Rows = {}

    def moment(record: Record) -> str:
        if record["algorithm"] == UNTRAINED:
            return BEFORE
        return AFTER if record["settings"]["learning_rate"] == learning_rate else SLOWER

    for heading, (when, score, _) in COLUMNS.items():
        values: dict[str, list[float]] = {}
        for record in records:
            if record["num_inference_steps"] == n_steps and moment(record) == when:
                values.setdefault(record["label"], []).append(record["scores"]["training"][score])
        for name, numbers in values.items():
            rows.setdefault(name, {})[heading] = mean(numbers)
    return rows


def _format(means: dict[str, Interval], heading: str) -> str:
    return f"{means[heading]:{COLUMNS[heading][2]}}" if heading in means else ""


def figure(tables: dict[int, Rows], title: str, path: Path) -> None:
    """Draws the scores after training against those before: a row for each number of steps, a colour for each kernel.

    Args:
        tables: the means, by number of steps.
        title: of the figure.
        path: file to write.
    """
    drawing = Figure(figsize=(4.6 * len(PANELS), 0.6 + 3.6 * len(tables)), layout="constrained")
    panels = drawing.subplots(len(tables), len(PANELS), squeeze=False)
    kernels = list(dict.fromkeys(name.split(",")[0] for rows in tables.values() for name in rows))
    colours = dict(zip(kernels, mpl.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    for row, (n_steps, rows) in zip(panels, tables.items(), strict=True):
        for axes, (score, name) in zip(row, PANELS.items(), strict=True):
            for one, means in rows.items():
                kernel, _, eta = one.partition(", ")
                before, after = means.get(f"before: {score}"), means.get(f"after: {score}")
                if before is not None and after is None:
                    axes.axvline(before.value, color=colours[kernel], linestyle=":", label=kernel)
                elif before is not None and after is not None:
                    axes.plot(before.value, after.value, "o", color=colours[kernel], label=kernel)
                    axes.hlines(after.value, before.low, before.high, color=colours[kernel], linewidth=1)
                    axes.vlines(before.value, after.low, after.high, color=colours[kernel], linewidth=1)
                    axes.annotate(eta, (before.value, after.value), (4, 4), textcoords="offset points", fontsize=7)
            limits = axes.axis()
            axes.axline((0, 0), slope=1, color="#bbbbbb", linewidth=0.8, zorder=0)
            axes.axis(limits)
            axes.set(xlabel="before training", ylabel="after training", title=f"{n_steps} steps: {name}")
            tidy(axes)
    by_name = dict(zip(*reversed(panels[0, 0].get_legend_handles_labels()), strict=True))
    drawing.legend(by_name.values(), by_name, loc="outside lower center", ncols=len(by_name), frameon=False)
    drawing.suptitle(title)
    save(drawing, path)


if __name__ == "__main__":
    main()
