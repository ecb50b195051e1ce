"""Parts of pages that are made from the code when the site is built, so that they cannot go stale.

A line ``<!-- generate: NAME ... -->`` of a page stands for what the function NAME of :data:`GENERATORS` returns.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from dpok_gym.utils.registry import import_attribute

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/dpok-gym/dpok-gym"

_MARK = re.compile(r"^<!-- generate: (\S+) ?(.*?) ?-->$", re.MULTILINE)


def expand(text: str) -> str:
    """Returns a page with all of its marks replaced.

    Raises:
        KeyError: if there is no such generator.
    """
    return _MARK.sub(lambda mark: GENERATORS[mark[1]](*mark[2].split("|")) if mark[2] else GENERATORS[mark[1]](), text)


# ------------------------------------------------------------------------------------------------------- registries


def environments() -> str:
    """Returns the table of the environment ids that are no tasks."""
    from dpok_gym.registration import ENVIRONMENTS, SUITABLE_PRESETS, TASKS

    rows = [
        [
            _code(env_id),
            _code(kwargs["model"]),
            _code(kwargs["prompts"]),
            _code(kwargs["reward"]),
            str(kwargs["num_inference_steps"]),
            f"{kwargs['eta']:g}",
            f"{kwargs['guidance_scale']:g}",
            _code(SUITABLE_PRESETS.get(env_id, "published-model")),
        ]
        for env_id, kwargs in ENVIRONMENTS.items()
        if env_id not in TASKS
    ]
    return _table(["id", "model", "prompts", "reward", "steps", "eta", "guidance scale", "preset"], rows)


def tasks() -> str:
    """Returns the table of the tasks."""
    from dpok_gym.registration import TASKS

    rows = [
        [
            _code(env_id),
            _code(task.kwargs["prompts"]),
            _code(task.kwargs["reward"]),
            str(task.kwargs["num_inference_steps"]),
            f"{task.reference_score:.3f}",
            f"{task.threshold:.3f}",
        ]
        for env_id, task in TASKS.items()
    ]
    return _table(["id", "prompts", "reward", "steps", "pre-trained", "threshold"], rows)


def environment() -> str:
    """Returns the docstring of the environment, which is Markdown, as those of Gymnasium's environments are."""
    from dpok_gym import DenoisingEnv

    text = inspect.cleandoc(DenoisingEnv.__doc__ or "")
    return re.sub(r":\w+:`[^`]+`", lambda role: _literal(role[0]), text[text.index("## Description") :])


def models() -> str:
    """Returns the table of the registered models."""
    from dpok_gym.models.registry import find_source, list_models

    rows = []
    for name in list_models():
        source = str(find_source(name))
        if os.path.isabs(source):
            source = f"{Path(source).relative_to(ROOT)}, in this package"
        rows.append([_code(name), source if "package" in source else _code(source)])
    return _table(["name", "where it comes from"], rows)


def rewards() -> str:
    """Returns the list of the registered rewards, with what their docstrings say."""
    from dpok_gym.rewards.registry import REWARDS

    entries = []
    for name in REWARDS.names():
        place = REWARDS.get(name)
        entries.append((name, _introduction(import_attribute("reward", place) if isinstance(place, str) else place)))
    return _definitions(entries)


def prompt_sets() -> str:
    """Returns the table of the named prompt sets."""
    from dpok_gym import list_prompt_sets, load_prompts

    rows = []
    for name in list_prompt_sets():
        prompts = load_prompts(name)
        rows.append([_code(name), str(len(prompts.train)), str(len(prompts.held_out)), _escape(prompts.train[0])])
    return _table(["name", "prompts", "held out", "the first one"], rows)


def algorithms() -> str:
    """Returns the table of the registered algorithms, with the first sentences of their docstrings."""
    from agents.algorithms.registry import ALGORITHMS, load_algorithm

    rows = []
    for name in ALGORITHMS.names():
        cls = load_algorithm(name)
        first = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]
        rows.append([f"{{py:class}}`~agents.{cls.__name__}`", _code(name), _markdown(first)])
    return _table(["class", "`--algo`", "what it is"], rows)


def presets() -> str:
    """Returns the list of the presets, each with its settings."""
    import yaml

    from agents import PRESETS

    parts = []
    for name, preset in PRESETS.items():
        settings = {
            "env_kwargs": _plain(preset.env_kwargs),
            "common": _plain(preset.common),
            "algorithms": _plain(preset.algorithms),
        }
        written = yaml.safe_dump({key: value for key, value in settings.items() if value}, sort_keys=False)
        only = f" Only for {', '.join(map(_code, preset.only))}." if preset.only else ""
        description = preset.description[:1].upper() + preset.description[1:]
        parts.append(f"### {name}\n\n{description}. {preset.images:,} images.{only}\n\n```yaml\n{written}```")
    return "\n\n".join(parts)


def metrics() -> str:
    """Returns a section for each column of the log, in groups of the same beginning."""
    from agents.common.metrics import METRICS, NAME

    titles = {
        "rollout": "Rewards",
        "held_out": "Held-out rewards",
        "images": "Images",
        "train": "Updates",
        "time": "Time",
    }
    parts = []
    for group, title in titles.items():
        parts.append(f"## {title}: `{group}/`")
        for name, metric in METRICS.items():
            if name.partition("/")[0] == group:
                heading = name.partition("/")[2].replace(NAME, "Each component by its name")
                parts.append(f"### {heading}\n\n`{name}`. {metric.meaning}")
                parts.append(f"- Unit: {metric.unit}.\n- Healthy: {metric.healthy}")
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        names: as they are written, such as ``--out``.
        value: what stands for its value in the help; "" for a switch.
        help: the description, with the default.
    """

    names: tuple[str, ...]
    value: str
    help: str


def commands() -> str:
    """Returns a section for each command of ``dpok``, with its options."""
    from agents.cli.main import COMMANDS

    parts = []
    for command, (_, description) in COMMANDS.items():
        also = " It also takes all options of [dpok train](#dpok-train)." if command == "doctor" else ""
        parts.append(f"## dpok {command}\n\n{description}{also}")
        for title, options in options_of(command).items():
            if title:
                parts.append(f"### {title}")
            parts.append(
                _definitions((f"{option.names[0]} {option.value}".strip(), _escape(option.help)) for option in options)
            )
    return "\n\n".join(parts)


def options_of(command: str) -> dict[str, list[Option]]:
    """Returns the options of a command, in groups by their title; "" for those without one."""
    from agents.cli.main import COMMANDS

    module = importlib.import_module(COMMANDS[command][0])
    if command == "train":
        return _options_of_train()
    # parse() returns the options as a dataclass, which is what the command line is made from.
    kind = module.OwnOptions if command == "doctor" else get_type_hints(module.parse)["return"]
    return {"": [option for options in _groups(kind).values() for option in options]}


def _options_of_train() -> dict[str, list[Option]]:
    """Returns the options that all trainings have, and those of each algorithm."""
    from agents.algorithms.presets import default_preset
    from agents.algorithms.registry import list_algorithms, load_algorithm
    from agents.cli.config import default_config
    from agents.cli.train import options_class
    from agents.common.algorithm import DenoisingAlgorithm
    from agents.common.arguments import describe_arguments
    from dpok_gym.registration import DEFAULT_ENVIRONMENT

    def groups(algorithm: str) -> dict[str, list[Option]]:
        preset = default_preset(DEFAULT_ENVIRONMENT)
        return _groups(options_class(default_config(DEFAULT_ENVIRONMENT, algorithm, preset)))

    found = groups("dpok")
    shared = {f"--{name.replace('_', '-')}" for name in describe_arguments(DenoisingAlgorithm)}
    titles = {"run": "The run", "environment": "The environment", "policy": "The policy"}
    sections = {title: found[name] for name, title in titles.items()}
    sections["Every algorithm"] = [option for option in found["algorithm"] if shared & set(option.names)]
    for algorithm in list_algorithms():
        own = [option for option in groups(algorithm)["algorithm"] if not shared & set(option.names)]
        sections[f"{load_algorithm(algorithm).__name__}: --algo {algorithm}"] = own
    return sections


def _groups(options: type) -> dict[str, list[Option]]:
    """Returns the options of a dataclass by the name of their group, as tyro's own parser has them."""
    import tyro

    from agents.cli.arguments import REGISTRY

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(options, registry=REGISTRY)
    groups: dict[str, list[Option]] = {}
    for group in parser._action_groups:
        name = (group.title or "").removesuffix(" options")
        for action in group._group_actions:
            if action.dest != "help":
                value = action.metavar if isinstance(action.metavar, str) else ""
                names = tuple(action.option_strings) or (str(action.dest).upper(),)
                groups.setdefault(name, []).append(Option(names, value, " ".join((action.help or "").split())))
    return groups


# ------------------------------------------------------------------------------------------------------------- code


def api(*names: str) -> str:
    """Returns the documentation of public names, from their docstrings."""
    blocks = []
    for name in " ".join(names).split():
        module, _, attribute = name.rpartition(".")
        kind = "autoclass" if isinstance(import_attribute("name", f"{module}:{attribute}"), type) else "autofunction"
        blocks.append(f"## {attribute}\n\n```{{eval-rst}}\n.. {kind}:: {name}\n```")
    return "\n\n".join(blocks)


def code(place: str, line: str = "") -> str:
    """Returns the code of a function, with a link to it.

    Args:
        place: ``module:function`` or ``module:Class.method``.
        line: a part of the line that the link leads to, and that is marked; it must be in exactly one line.

    Raises:
        ValueError: if no line, or more than one, has this text.
    """
    place = place.strip()
    module, _, name = place.partition(":")
    function: Any = import_attribute("function", f"{module}:{name.partition('.')[0]}")
    for part in name.split(".")[1:]:
        function = inspect.getattr_static(function, part)
    function = function.fget if isinstance(function, property) else inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    shown = _without_docstring(lines)
    path = Path(inspect.getsourcefile(function) or "").relative_to(ROOT).as_posix()
    marked: list[int] = []
    linked = first
    if line.strip():
        marked = [index for index, (number, text) in enumerate(shown, 1) if line.strip() in text]
        if len(marked) != 1:
            raise ValueError(f"{place} has {len(marked)} lines with {line.strip()!r}, and the page links to one")
        linked = first + shown[marked[0] - 1][0]
    text = textwrap.dedent("".join(text for _, text in shown))
    emphasis = f":emphasize-lines: {marked[0]}\n" if marked else ""
    url = f"{REPOSITORY}/blob/{_revision()}/{path}#L{linked}"
    return f"[`{name}`, line {linked} of `{path}`]({url}):\n\n```{{code-block}} python\n{emphasis}\n{text}```"


def _without_docstring(lines: Sequence[str]) -> list[tuple[int, str]]:
    """Returns the lines of a function and their numbers, counted from 0, without its docstring."""
    body = ast.parse(textwrap.dedent("".join(lines))).body[0]
    assert isinstance(body, ast.FunctionDef)
    first = body.body[0]
    docstring = range(0)
    if ast.get_docstring(body) is not None:
        docstring = range(first.lineno - 1, first.end_lineno or first.lineno)
    return [(number, text) for number, text in enumerate(lines) if number not in docstring]


@cache
def _revision() -> str:
    """Returns the commit that the site is built from, so that links to lines stay right; "main" without git."""
    if shutil.which("git") is None:
        return "main"
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "main"


def file(path: str, heading: str = "") -> str:
    """Returns a Markdown file of the repository, without its title, for a page in a folder of ``docs/``.

    Args:
        path: of the file, from the root of the repository.
        heading: of the part that is wanted, which ends at the next heading; all parts if there is none.

    Raises:
        ValueError: if the file has no such heading.
    """
    source = ROOT / path.strip()
    text = source.read_text(encoding="utf-8")
    if heading:
        _, *parts = re.split(r"^#+ (.+)\n", text, flags=re.MULTILINE)
        by_heading = dict(zip(parts[::2], parts[1::2], strict=True))
        if heading not in by_heading:
            raise ValueError(f"{path} has no part {heading!r}; there are {', '.join(by_heading)}")
        text = by_heading[heading]
    else:
        text = text.partition("\n")[2]

    def relink(link: re.Match[str]) -> str:
        target, hash_, anchor = link[2].partition("#")
        if not target or "://" in target:
            return link[0]
        found = (source.parent / target).resolve().relative_to(ROOT)
        if found.parts[0] == "docs" or link[1].startswith("!"):
            return f"{link[1]}(../{os.path.relpath(found, 'docs')}{hash_}{anchor})"
        kind = "tree" if (ROOT / found).is_dir() else "blob"
        return f"{link[1]}({REPOSITORY}/{kind}/main/{found.as_posix()}{hash_}{anchor})"

    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", relink, text)


def notebooks() -> str:
    """Writes the two Jupyter notebooks of each lab, and returns the table of links to them."""
    from docs.notebooks import write

    rows: dict[str, list[str]] = {}
    for path in write(ROOT / "docs" / "_build" / "notebooks"):
        lab = path.stem.removesuffix("_solved")
        rows.setdefault(lab, [f"[]({lab}.md)"]).append(f"{{download}}`{path.name} <../_build/notebooks/{path.name}>`")
    return _table(["lab", "for students", "with solutions"], rows.values())


# --------------------------------------------------------------------------------------------------------- Markdown


def _introduction(function: Any) -> str:
    """Returns a docstring up to its first section, as Markdown in one paragraph."""
    text = inspect.cleandoc(function.__doc__ or "")
    return _markdown(re.split(r"^(?:Args|Returns|Raises|Attributes):$", text, flags=re.MULTILINE)[0])


def _markdown(text: str) -> str:
    """Returns a part of a docstring in Markdown, on one line."""
    parts = re.split(r"(:\w+:`[^`]+`|``[^`]+``)", " ".join(text.split()))
    return "".join(_literal(part) if part.endswith("`") else _escape(part) for part in parts)


def _literal(text: str) -> str:
    """Returns ``x`` or :class:`~a.b.x` of a docstring as code in Markdown."""
    content = re.sub(r"^:\w+:", "", text).strip("`").removeprefix("~")
    return _code(content.rpartition(".")[2] if text.startswith(":") else content)


def _code(text: str) -> str:
    return f"`{text}`"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_<>\[\]$|{}])", r"\\\1", text)


def _definitions(entries: Iterable[tuple[str, str]]) -> str:
    return "\n\n".join(f"`{name}`\n: {text or 'See the text above.'}" for name, text in entries)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> Any:
    """Returns a value of dicts, lists and scalars only, for YAML."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


GENERATORS: dict[str, Callable[..., str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        environments,
        tasks,
        environment,
        models,
        rewards,
        prompt_sets,
        algorithms,
        presets,
        metrics,
        commands,
        api,
        code,
        file,
        notebooks,
    )
}


def setup(app: Any) -> dict[str, Any]:
    """Connects the extension to Sphinx."""

    def read(app: Any, page: str, source: list[str]) -> None:
        source[0] = expand(source[0])

    def find_outdated(app: Any, env: Any, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
        # The code may have changed, although the page has not.
        pages = env.found_docs - added - changed
        return [page for page in pages if _MARK.search(Path(env.doc2path(page)).read_text(encoding="utf-8"))]

    def shorten(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        # The environment's docstring is Markdown with headings; it is a page of its own.
        headings = [number for number, line in enumerate(lines) if line.startswith("## ")]
        if headings:
            del lines[headings[0] :]

    app.connect("autodoc-process-docstring", shorten)
    app.connect("source-read", read)
    app.connect("env-get-outdated", find_outdated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
