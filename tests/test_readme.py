"""The README and the pages of docs/: their code runs, their commands parse, their links lead somewhere.

The build of the site runs the labs and checks the links between its pages.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from agents.cli.main import COMMANDS, main, parse
from dpok_gym import __version__
from dpok_gym.models import clear_model_cache
from dpok_gym.shapes import WEIGHTS
from tests.agents.algorithms.support import BUILT_IN

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / ".github").glob("*.md")),
    ]
}
README = PAGES["README.md"]

#: What the test changes in a page's code, so that it takes seconds or needs no files of the reader.
SUBSTITUTES = {
    "README.md": {"preset.images *": "64 *", '"three green squares"] * 64': '"three green squares"] * 4'},
    "docs/guides/own_algorithm.md": {"images_per_iteration=64": "images_per_iteration=2", "1280 * 20": "1"},
    "docs/guides/check_up.md": {"DPOK-Shapes-v0": "DPOK-Mixture-v0"},
    "docs/guides/lora_elsewhere.md": {'"path/to/model"': repr(str(WEIGHTS))},
    "docs/guides/other_agents.md": {"n_steps=100, batch_size=100).learn(10_000)": "n_steps=4, batch_size=4).learn(4)"},
    "docs/guides/several_gpus.md": {"images_per_iteration=64": "images_per_iteration=2", "10_000": "1"},
    "docs/guides/stable_diffusion.md": {
        '"path/to/model").to("cuda")': f"{str(WEIGHTS)!r})",
        "DPOK-SD15-v0": "DPOK-Shapes-v0",
    },
    "docs/guides/steering.md": {
        '"three green squares"] * 4': '"three green squares"]',
        "n_particles=8": "n_particles=2",
    },
    "docs/guides/watch.md": {"images_per_iteration=64": "images_per_iteration=2", "1280 * 20": "1"},
    "docs/explanation/from_trl.md": {
        '"path/to/model").to("cuda")': f"{str(WEIGHTS)!r})",
        "DPOK-SD15-v0": "DPOK-Shapes-v0",
        '["a cat", "a dog"]': '["a red circle"]',
        "num_inference_steps=50": "num_inference_steps=2",
        "images_per_iteration=64": "images_per_iteration=2",
        "batch_size=64 * 50": "batch_size=4",
        "100 * 64 * 50": "1",
    },
}

#: Pages whose code needs a run in runs/mine.
NEED_A_RUN = ("docs/guides/use_a_run.md", "docs/guides/watch.md", "docs/guides/lora_elsewhere.md")

#: The reader's own module, which pages call my_module.
MY_MODULE = '''
from agents import REINFORCE


class Mine(REINFORCE):
    """An algorithm."""


class Contrast:
    """A reward."""

    def __call__(self, images, prompts):
        return images.std(dim=(1, 2, 3))
'''


@pytest.fixture
def readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of somebody who follows the pages."""
    (tmp_path / "my_module.py").write_text(MY_MODULE, encoding="utf-8")
    shutil.copytree(ROOT / "benchmarks" / "recipes", tmp_path / "benchmarks" / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_module", None)
    clear_model_cache()  # the pages' agents have left their LoRA in the shared networks


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


def run_python(page: str) -> dict[str, Any]:
    """Runs the Python of a page, block after block, and returns its names."""
    code = "\n".join(blocks(page, "python"))
    for written, substitute in SUBSTITUTES.get(page, {}).items():
        assert written in code, f"{page} has no {written!r} any more"
        code = code.replace(written, substitute)
    names: dict[str, Any] = {"__name__": "readers_script"}
    exec(compile(code, page, "exec"), names)
    return names


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Returns page and words of each command line in a shell block or between backticks that starts with a program."""
    found = []
    for page in PAGES:
        lines = "\n".join(blocks(page, "sh")).splitlines()
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))
        for line in lines:
            for part in line.split(" && "):
                if part.startswith(f"{program} "):
                    found.append((page, shlex.split(part.removeprefix(program), comments=True)))
    return found


# ---------------------------------------------------------------------------------------------------------------- code


@pytest.mark.slow
def test_readme_code_runs(readers_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One iteration; that a training learns is tested where more images are drawn (tests/agents, and the labs)."""
    names = run_python("README.md")
    before, after = names["before"], names["after"]
    assert before.images.shape == after.images.shape
    assert (before.images != after.images).any()  # of the same noise
    shares = f"fully aligned: {before.aligned_share:.0%} before, {after.aligned_share:.0%} after"
    assert shares in capsys.readouterr().out
    assert names["agent"].images_drawn == 64
    assert (readers_folder / "my_lora" / "pytorch_lora_weights.safetensors").is_file()
    assert names["image"].size == (64, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.startswith("docs/") and "/labs/" not in page and blocks(page, "python")]
)
def test_code_of_the_documentation_runs(page: str, readers_folder: Path) -> None:
    if page in NEED_A_RUN:
        few = ["--images", "4", "--images-per-iteration", "4", "--eval-images", "2", "--num-inference-steps", "2"]
        assert main(["train", "--out", "runs/mine", *few]) == 0
    if page == "docs/guides/lora_elsewhere.md":
        assert main(["export", "runs/mine", "--format", "kohya", "--out", "three_squares"]) == 0
    names = run_python(page)
    if page == "docs/guides/own_algorithm.md":
        assert names["agent"].images_drawn == 2
    if page == "docs/guides/own_reward.md":
        scored = names["env"].reward(torch.rand(2, 3, 64, 64), ["a red circle"] * 2)
        assert list(scored.components) == ["contrast", "shapes-alignment"]
    if page == "docs/guides/use_a_run.md":
        assert (readers_folder / "my_model" / "model_index.json").is_file()
        assert (readers_folder / "my_lora" / "pytorch_lora_weights.safetensors").is_file()


def test_quick_start_is_short() -> None:
    code = [line for line in blocks("README.md", "python")[0].splitlines() if line.strip()]
    assert len(code) <= 15


# ------------------------------------------------------------------------------------------------------------ commands


def test_install_commands() -> None:
    assert "pip install -c constraints.txt -e . && dpok train\n" in README
    assert 'pip install -c constraints.txt -e ".[test]" && pytest\n' in README


@pytest.mark.slow
@pytest.mark.parametrize(("page", "words"), commands("dpok"))
def test_command_lines_parse(page: str, words: list[str], readers_folder: Path) -> None:
    """Options that a page shows are options that there are; nothing is run."""
    if words[0] not in COMMANDS:
        assert words in (["--version"], ["--help"])
    elif words == ["train", "--help"]:
        with pytest.raises(SystemExit) as ended:
            parse(words)
        assert not ended.value.code
    elif words[1:] or words[0] == "train":  # else a mere mention of a command that needs further words
        command, _ = parse(words)
        assert command == words[0]


#: The options that pages mention, each with the first page that does.
MENTIONED = {
    span: page
    for page in reversed(PAGES)
    if page == "README.md" or page.startswith("docs/")
    for span in re.findall(r"`(--[^`\n]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))
}


def is_known(words: Sequence[str]) -> bool:
    """Returns whether a command knows the options; a value may be missing, as in a mere mention."""
    try:
        parse(list(words))
    except ValueError as error:
        return "unknown option" not in str(error)
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("span", "page"), MENTIONED.items())
def test_single_options_are_known(span: str, page: str) -> None:
    # The doctor knows the options of dpok train too; some are of one algorithm only.
    commands = (["doctor"], ["doctor", "--algo", "diffusion-dpo"], ["label"], ["fit-reward"])
    assert any(is_known([*command, *shlex.split(span)]) for command in commands), page


def test_command_lines_are_found() -> None:
    """Guards the test above, which would pass on pages where no command is found."""
    found = {words[0] for _, words in commands("dpok")}
    assert found >= {"train", "sample", "evaluate", "export", "label", "fit-reward", "serve-reward"}


def test_a_wrong_option_would_be_noticed(readers_folder: Path) -> None:
    with pytest.raises((ValueError, SystemExit)):
        parse(["train", "--set", "group_size=8"])


@pytest.mark.parametrize(("page", "words"), commands("python -m"))
def test_modules_that_pages_run_are_there(page: str, words: list[str]) -> None:
    name = words[1] if words[0] == "pydoc" else words[0]
    module = importlib.util.find_spec(name)
    assert module is not None, f"{page}: python -m {name}"
    assert module.origin is not None
    if name.startswith("benchmarks."):
        source = Path(module.origin).read_text(encoding="utf-8") + (ROOT / "benchmarks" / "runs.py").read_text("utf-8")
        own = words[: words.index("--")] if "--" in words else words  # what is behind it goes to another command
        for option in [word for word in own if word.startswith("--")]:
            assert f'"{option}"' in source, f"{page}: {name} has no option {option}"


def test_extras_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for page, text in PAGES.items():
        for extra in re.findall(r'-e "\.\[([\w,-]+)\]"', text):
            assert set(extra.split(",")) <= project["project"]["optional-dependencies"].keys(), page
        for group in re.findall(r"--group (\w+)", text):
            assert group in project["dependency-groups"], page


# --------------------------------------------------------------------------------------------------------------- links


def anchors(page: str) -> set[str]:
    """Returns the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", PAGES[page], flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Also those of pages that are read on GitHub; the build of the site looks at the anchors of its own pages."""
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for link in re.findall(r"\[[^]]*\]\(([^)]+)\)", prose):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        name = target.resolve().relative_to(ROOT).as_posix()
        if anchor and "<!-- generate" not in PAGES[name]:
            assert anchor in anchors(name), f"{page} links to {link}"


def test_readme_is_short_and_names_every_algorithm() -> None:
    assert len(README.split()) <= 900
    assert all(f"`{cls.__name__}`" in README for cls in BUILT_IN.values())


def test_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    first = re.search(r"^## .*?(\d+\.\d+\.\d+)", PAGES["CHANGELOG.md"], flags=re.MULTILINE)
    assert first is not None
    assert first[1] == __version__
