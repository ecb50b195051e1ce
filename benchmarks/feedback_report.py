"""The tables and the figure of :mod:`benchmarks.feedback`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.figures import explain, save, tidy
from benchmarks.markdown import markdown
from benchmarks.runs import Record
from benchmarks.statistics import Interval, mean
from dpok_gym.shapes.choices import QUALITY_WEIGHT

PRETRAINED = "pre-trained"
#: The scores of the judge, with the headings of the table and the titles of the panels.
SCORES = {"aligned": "share fully aligned", "quality": "quality"}
#: The columns of a table, and how their numbers are written.
COLUMNS = {
    "aligned": (SCORES["aligned"], ".3f"),
    "quality": (SCORES["quality"], ".3f"),
    "kl": ("KL, nats", ".1f"),
    "agreement": ("agreement of the reward", ".2f"),
}
_COLOURS = ("#D55E00", "#0072B2", "#555555", "#009E73", "#CC79A7")

#: The mean of each score, by label and number of choices, for one rate of errors.
Means = dict[str, dict[int, Interval]]


def rank(records: Sequence[Record]) -> None:
    """Prints the runs of the tuning by number of choices, those first whose images the person likes best."""
    columns = {"liked": ".3f", "aligned": ".2f", "quality": ".2f", "kl": ".0f"}
    for n_choices in sorted({record["choices"] for record in records}):
        table = Table("", *columns, title=f"after {n_choices} choices")
        for record in sorted(records, key=liked, reverse=True):
            if record["choices"] == n_choices:
                scores = record["scores"] | {"liked": liked(record)}
                table.add_row(record["label"], *(f"{scores[name]:{form}}" for name, form in columns.items()))
        Console(width=120).print(table)


def liked(record: Record) -> float:
    """Returns how much the person, without errors, likes the images of a run on average."""
    return record["scores"]["alignment"] + QUALITY_WEIGHT * record["scores"]["quality"]


def report(records: Sequence[Record], targets: Sequence[float], folder: Path) -> None:
    """Writes and prints the tables, and draws the figure.

    Args:
        records: of the runs.
        targets: shares of fully aligned images, whose price in choices is looked for.
        folder: for the files.
    """
    rates = sorted({record["error_rate"] for record in records if record["label"] != PRETRAINED})
    of_rates = {rate: [r for r in records if r["error_rate"] == rate or r["label"] == PRETRAINED] for rate in rates}
    tables = {"Choices that are needed": make_prices(of_rates, targets)}
    tables |= {f"{rate:.0%} errors": make_cells(of_rate) for rate, of_rate in of_rates.items()}
    texts = []
    for title, (cells, headings) in tables.items():
        table = Table("", *headings, title=title)
        for name, row in cells.items():
            table.add_row(name, *row)
        Console(width=180).print(table)
        texts.append(f"## {title}\n\n{markdown(cells, headings)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text("\n".join(texts), encoding="utf-8")
    if rates:
        figure(of_rates, folder / "feedback.png")


def make_means(records: Sequence[Record], score: str) -> Means:
    """Returns the means over the seeds of a score, by label and number of choices, with their intervals."""
    values: dict[str, dict[int, list[float]]] = {}
    for record in records:
        value = record["scores"].get(score, record.get(score))
        if value is not None:
            values.setdefault(record["label"], {}).setdefault(record["choices"], []).append(value)
    return {
        label: {n: mean(numbers) for n, numbers in sorted(by_choices.items())} for label, by_choices in values.items()
    }


def make_prices(
    of_rates: dict[float, list[Record]], targets: Sequence[float]
) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the fewest choices with which each way reaches a share on average, and the headings.

    Args:
        of_rates: the records for each rate of errors.
        targets: shares of fully aligned images.
    """
    cells: dict[str, list[str]] = {}
    for target in targets:
        for of_rate in of_rates.values():
            for label, by_choices in make_means(of_rate, "aligned").items():
                if label != PRETRAINED:
                    enough = [n for n, share in by_choices.items() if share.value >= target]
                    cell = str(min(enough)) if enough else f"more than {max(by_choices)}"
                    cells.setdefault(label, []).append(cell)
    return cells, [f"{target:.0%} aligned, {rate:.0%} errors" for target in targets for rate in of_rates]


def make_cells(records: Sequence[Record]) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the cells of a table by label, and the headings of its columns."""
    means = {score: make_means(records, score) for score in COLUMNS}
    numbers = sorted({record["choices"] for record in records})
    cells: dict[str, list[str]] = {}
    for label in dict.fromkeys(record["label"] for record in records):
        for n in numbers:
            row = {score: means[score].get(label, {}).get(n) for score in COLUMNS}
            if any(row.values()):
                name = f"{label}, {n}" if n else label
                cells[name] = [
                    "" if (value := row[score]) is None else format(value, form) for score, (_, form) in COLUMNS.items()
                ]
    return cells, [heading for heading, _ in COLUMNS.values()]


def figure(of_rates: dict[float, list[Record]], path: Path) -> None:
    """Draws the scores against the number of choices: a row for each score, a column for each rate of errors.

    Args:
        of_rates: the records for each rate of errors, with those of the pre-trained model.
        path: file to write.
    """
    drawing = Figure(figsize=(0.6 + 3.4 * len(of_rates), 0.6 + 2.6 * len(SCORES)), layout="constrained")
    panels = drawing.subplots(len(SCORES), len(of_rates), squeeze=False, sharex=True, sharey="row")
    for row, (score, title) in zip(panels, SCORES.items(), strict=True):
        for axes, (rate, records) in zip(row, of_rates.items(), strict=True):
            means = make_means(records, score)
            before = means.pop(PRETRAINED, {}).get(0)
            if before is not None:
                axes.axhline(before.value, color="#8c8c8c", linestyle=":", label=PRETRAINED)
            for shift, (label, by_choices) in enumerate(means.items()):
                # Side by side, so that the intervals can be told apart.
                x = np.array(list(by_choices)) * 1.03 ** (shift - (len(means) - 1) / 2)
                value, low, high = np.array(list(by_choices.values())).T
                axes.plot(x, value, "o-", markersize=4, linewidth=1, color=_COLOURS[shift], label=label)
                axes.vlines(x, low, high, color=_COLOURS[shift], linewidth=1)
            numbers = sorted({record["choices"] for record in records} - {0})
            axes.set_xscale("log")
            axes.set_xticks(numbers, map(str, numbers))
            axes.minorticks_off()
            axes.set_title(f"{rate:.0%} errors", fontsize=10)
            tidy(axes)
        row[0].set_ylabel(title)
    for axes in panels[-1]:
        axes.set_xlabel("choices")
    handles, names = panels[0, 0].get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    records = [record for of_rate in of_rates.values() for record in of_rate]
    n_seeds = len({record["seed"] for record in records})
    explain(
        drawing,
        f"The judge's scores of {records[0]['eval_images']} images of “{records[0]['prompt']}”, after learning from "
        "the choices of a simulated person who errs in a share of them. Means over "
        f"{n_seeds} seeds, with 95 % bootstrap intervals. DPOK follows a reward that is fitted to the choices; best of "
        "4: that reward chooses among four images of the pre-trained model; Diffusion-DPO learns from the choices "
        "themselves.",
    )
    save(drawing, path)
