"""``dpok label``."""

from __future__ import annotations

import os
import shlex
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import tyro

from agents.cli.arguments import UsageError, default_hint, given, parse_options
from agents.cli.drawing import DrawingOptions

if TYPE_CHECKING:
    from dpok_gym.choices.pairs import Pair

#: Images that are drawn unless --images says more.
DEFAULT_IMAGES = 120
#: The file of the choices in the folder of --out, and the environment variable of the token.
CHOICES, TOKEN_VARIABLE = "choices.jsonl", "DPOK_LABEL_TOKEN"


@dataclass
class Label:
    """Draw pairs of images, and open a page on which people choose the better one of each.

    The folder gets the images and choices.jsonl, for dpok fit-reward. Each answer is on the disk before the next pair
    is shown. After an end or a kill, the same command goes on; so does dpok label --out FOLDER, once all is drawn.
    Ctrl-C ends the page.
    """

    prompts: Annotated[str | None, default_hint("TEXT|SET|FILE", "the run's")] = None
    """What to draw: a text, a named set, or a file of prompts. With --images-from, the table of the images' prompts."""
    images: Annotated[int | None, default_hint("INT", "120")] = None
    """Images to draw, an even number: half as many pairs, each image in one of them. A larger number than before adds
    pairs."""
    out: Path = Path("choices")
    """Folder of the images and the choices."""
    run: Annotated[tuple[Path, ...], default_hint("FOLDER [FOLDER]", "none: the pre-trained model, twice")] = ()
    """Run folder of dpok train: its images are compared with those of the pre-trained model, from the same noise. Two
    runs are compared with each other."""
    images_from: Annotated[Path | None, default_hint("FOLDER", "none: images are drawn")] = None
    """Folder of images to compare, in place of drawing. It has a prompts.csv or prompts.jsonl with the columns file and
    prompt; also model or run, to compare these."""
    repeats: float = 0.1
    """Share of a person's pairs that are shown to them again, with the sides swapped, in [0, 1]. It tells how sure they
    are."""
    shared: float = 0.1
    """Share of the pairs that everybody gets, in [0, 1]. It tells how well people agree. The others go to one person
    each."""
    seed: int = 0
    """Seed of the first image, of the pairs and of the sides, 0 or more."""
    report: bool = False
    """Print the results of the choices so far, and open no page."""
    host: str = "127.0.0.1"
    """Network interface to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8100
    """Port to listen on, 0 for any free one."""
    token: str | None = field(default=None, repr=False)
    """Token that people need to get in; the address that is printed has it. Other users of the machine can read a
    command line: better set the environment variable DPOK_LABEL_TOKEN."""
    allowed_host: tuple[str, ...] = ()
    """Names by which browsers call this server, beside localhost, the machine's name and numeric addresses."""
    open: bool = True
    """Open the page in the browser of this machine."""
    trust: bool = False
    """Run the code that the configs of the runs name: models, rewards and the like of modules."""
    draw: Annotated[DrawingOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=DrawingOptions)


def parse(argv: Sequence[str]) -> Label:
    """Reads the options."""
    return parse_options(Label, "dpok label", argv)


def run(options: Label) -> int:
    """Draws pairs and serves the page until Ctrl-C, or prints the results; returns the exit code.

    Raises:
        ValueError: if an option is out of range, a prompt cannot be read, or the folder was begun in another way.
        OSError: if another process holds the folder, or the port is taken.
    """
    from dpok_gym.utils.files import locked
    from dpok_gym.utils.serving import check_host, find_token
    from dpok_gym.utils.validation import MAX_SEED, check_fraction, check_integer

    if options.report:
        return _print_report(options.out / CHOICES)
    # Before anything is drawn, which may take long.
    if options.images is not None:
        check_integer("--images", options.images, minimum=2, maximum=10**6)
        if options.images % 2:
            raise ValueError(f"--images must be even, since each pair has two; got {options.images}")
    check_integer("--seed", options.seed, minimum=0, maximum=MAX_SEED)
    check_fraction("--repeats", options.repeats)
    check_fraction("--shared", options.shared)
    check_integer("--port", options.port, minimum=0, maximum=2**16 - 1)
    check_host(options.host)
    token = find_token(options.token, TOKEN_VARIABLE)
    with locked(options.out):
        return _serve(options, _make_pairs(options), token)


def _make_pairs(options: Label) -> list[Pair]:
    """Returns the pairs of the folder, and makes those that are missing."""
    from dpok_gym.choices.pairs import FILE_NAME, find_table, import_images, read_pairs

    of_drawing = given(options, "images") | given(options.draw, *vars(options.draw))
    given_options = [f"--{name.replace('_', '-')}" for name in of_drawing if name != "device"]
    if options.images_from is not None:
        given_options += ["--run"] if options.run else []
        if given_options:
            raise UsageError(f"--images-from compares images that are there; leave out {given_options[0]}")
        table = Path(options.prompts) if options.prompts is not None else find_table(options.images_from)
        import_images(options.images_from, table, options.seed, options.out)
    elif options.prompts is not None or options.run:
        _draw(options)
    elif not (options.out / FILE_NAME).exists():
        raise UsageError("--prompts is missing; give the text to draw, in quotation marks, a named set or a file")
    elif given_options:
        raise UsageError(f"{given_options[0]} needs --prompts or --run too, as in the command that began {options.out}")
    pairs = read_pairs(options.out)
    if not pairs:
        raise ValueError(f"the pairs of {options.out} are not complete; repeat the command that began them")
    return pairs


def _draw(options: Label) -> None:
    # These load torch, which a folder with pairs does not need.
    from tqdm import tqdm

    from agents.cli.pair_drawing import draw_pairs, find_sources

    sources = find_sources(options.run, options.trust)
    n_images = DEFAULT_IMAGES if options.images is None else options.images
    # The delay keeps the bar away from the line of an error that comes before the first image.
    with tqdm(total=n_images, desc="drawing", unit=" images", leave=False, delay=1e-3) as bar:
        draw_pairs(
            options.out,
            options.draw,
            sources,
            options.prompts,
            n_images,
            options.seed,
            trust=options.trust,
            log=bar.update,
        )


def _serve(options: Label, pairs: list[Pair], token: str | None) -> int:
    """Serves the page until Ctrl-C."""
    from dpok_gym.choices.page import make_app
    from dpok_gym.choices.pairs import read_settings
    from dpok_gym.choices.session import Session
    from dpok_gym.choices.store import ChoiceStore
    from dpok_gym.utils.serving import needs_extra, run_server

    path = options.out / CHOICES
    store = ChoiceStore(path)
    try:
        seed = read_settings(options.out)["seed"]
        session = Session(store, pairs, seed=seed, repeats=options.repeats, shared=options.shared)
        app = make_app(session, token=token, allowed_hosts=[options.host, *options.allowed_host])
        before = len(store.choices)

        def announce(address: str, is_private: bool) -> None:
            address += f"/?token={quote(token)}" if token else ""
            print(f"{len(pairs)} pairs, {before} choices so far; the page: {address} (Ctrl-C ends it)", flush=True)
            if not (is_private or token):
                print("everyone who reaches this port can choose; --token lets in those who have it", file=sys.stderr)
            if options.open and _has_screen():
                webbrowser.open(address)

        with needs_extra("label"):
            # Connections that browsers hold open must not delay the end.
            run_server(app, options.host, options.port, announce, timeout_graceful_shutdown=2)
    finally:
        store.close()
    command = f"dpok fit-reward {shlex.quote(str(path))} --out my_reward"
    made = max(len(store.choices) - before, 0)  # older ones may have been taken back
    print(f"\n{made} new choices, {len(store.choices)} in {path}; learn a reward from them with: {command}")
    return 0


def _has_screen() -> bool:
    """Returns whether there is a browser with windows: one for terminals would take this terminal."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _print_report(path: Path) -> int:
    """Prints the results of a file of choices."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dpok_gym.choices.records import read_choices
    from dpok_gym.choices.report import make_report
    from dpok_gym.choices.tables import disagreement_table, report_tables

    choices = read_choices(path)
    if not choices:
        raise ValueError(f"there are no choices in {path} yet; make some with dpok label")
    console = Console()
    result = make_report(choices)
    for text_table in [*report_tables(result), *disagreement_table(result)]:
        table = Table(*text_table.header, title=text_table.title, title_justify="left")
        for row in text_table.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        console.print(f"{text_table.note}\n", markup=False, highlight=False)
    return 0
