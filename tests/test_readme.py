"""The README and the pages of docs/: their code runs, their commands parse, their links and tables are right."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from agents.cli.main import COMMANDS, main, parse
from dpok_gym import __version__
from dpok_gym.models import clear_model_cache
from dpok_gym.shapes import WEIGHTS

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
    "README.md": {
        "preset.images *": "640 *",
        'PPO("MultiInputPolicy", scalar).learn(10_000)': (
            'PPO("MultiInputPolicy", scalar, n_steps=20, batch_size=20).learn(20)'
        ),
    },
    "docs/guides/stable_diffusion.md": {
        '"path/to/model").to("cuda")': f"{str(WEIGHTS)!r})",
        "DPOK-SD15-v0": "DPOK-Shapes-v0",
    },
    "docs/guides/lora_elsewhere.md": {'"path/to/model"': repr(str(WEIGHTS))},
    "docs/guides/several_gpus.md": {"agent.learn(10_000)": "agent.learn(1)"},  # one iteration
}

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


@pytest.fixture(scope="session")
def names_in_the_package() -> dict[str, list[str]]:
    """Built-in names, from a process of its own: other tests register more of them in this one."""
    code = (
        "import json, gymnasium, dpok_gym, agents; from dpok_gym.registration import ENVIRONMENTS; "
        "print(json.dumps({'environments': list(ENVIRONMENTS), 'rewards': dpok_gym.list_rewards(), "
        "'prompts': dpok_gym.list_prompt_sets(), 'algorithms': agents.list_algorithms(), "
        "'presets': list(agents.PRESETS)}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


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
def test_readme_code_runs_and_learns(readers_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_python("README.md")
    # The noise is the same before and after. With 640 of 2,240 images the mean reward grows by about 0.08.
    before, after = names["before"], names["after"]
    assert after.mean_reward > before.mean_reward + 0.03
    assert after.aligned_share > before.aligned_share
    shares = f"fully aligned: {before.aligned_share:.0%} before, {after.aligned_share:.0%} after"
    assert shares in capsys.readouterr().out
    assert names["agent"].images_drawn == 640
    assert (readers_folder / "my_lora" / "pytorch_lora_weights.safetensors").is_file()
    assert names["image"].size == (64, 64)
    scored = names["env"].reward(torch.rand(2, 3, 64, 64), ["a red circle"] * 2)
    assert list(scored.components) == ["contrast", "shapes-alignment"]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/") and blocks(page, "python")])
def test_code_of_the_documentation_runs(page: str, readers_folder: Path) -> None:
    if page in ("docs/reference/runs.md", "docs/guides/lora_elsewhere.md"):
        few = ["--images", "4", "--images-per-iteration", "4", "--eval-images", "2", "--num-inference-steps", "2"]
        assert main(["train", "--out", "runs/mine", *few]) == 0
    if page == "docs/guides/lora_elsewhere.md":
        assert main(["export", "runs/mine", "--format", "kohya", "--out", "three_squares"]) == 0
    names = run_python(page)
    if page == "docs/explanation/algorithms.md":
        names["agent"].learn(1)
        assert names["agent"].images_drawn == 64
    if page == "docs/reference/runs.md":
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "words"),
    [
        (page, shlex.split(span))
        for page in PAGES
        if page == "README.md" or page.startswith("docs/")
        for span in re.findall(r"`(--[^`\n]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))
    ],
)
def test_single_options_are_known(page: str, words: list[str], readers_folder: Path) -> None:
    messages = []
    # The doctor knows the options of dpok train too; some are of one algorithm only.
    for command in (["doctor"], ["doctor", "--algo", "diffusion-dpo"], ["label"], ["fit-reward"]):
        try:
            parse([*command, *words])
            messages.append("")
        except ValueError as error:  # a value may be missing, as in a mere mention of the option
            messages.append(str(error))
    assert not all("unknown option" in message for message in messages)


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
        for option in [word for word in words if word.startswith("--")]:
            assert f'"{option}"' in source, f"{page}: {name} has no option {option}"


def test_extras_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for page, text in PAGES.items():
        for extra in re.findall(r'-e "\.\[([\w,-]+)\]"', text):
            assert extra in project["project"]["optional-dependencies"], page
        for group in re.findall(r"--group (\w+)", text):
            assert group in project["dependency-groups"], page


# ---------------------------------------------------------------------------------------------------- links and tables


def anchors(page: str) -> set[str]:
    """Returns the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", PAGES[page], flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for link in re.findall(r"\[[^]]*\]\(([^)]+)\)", prose):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), f"{page} links to {link}"


def test_every_page_is_linked_from_the_readme_and_from_the_index() -> None:
    for path in sorted((ROOT / "docs").rglob("*.md")):
        name = path.relative_to(ROOT / "docs").as_posix()
        assert f"(docs/{name})" in README
        assert path.name == "index.md" or f"({name})" in PAGES["docs/index.md"]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        ("README.md", "algorithms"),
        ("docs/explanation/algorithms.md", "algorithms"),
        ("docs/explanation/algorithms.md", "presets"),
        ("docs/reference/environment.md", "environments"),
        ("docs/guides/own_prompts.md", "prompts"),
        ("docs/guides/own_reward.md", "rewards"),
    ],
)
def test_tables_name_everything(page: str, kind: str, names_in_the_package: dict[str, list[str]]) -> None:
    rows = "\n".join(line for line in PAGES[page].splitlines() if line.startswith("| "))
    assert set(names_in_the_package[kind]) <= set(re.findall(r"`([^`]+)`", rows))


def test_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    first = re.search(r"^## .*?(\d+\.\d+\.\d+)", PAGES["CHANGELOG.md"], flags=re.MULTILINE)
    assert first is not None
    assert first[1] == __version__
