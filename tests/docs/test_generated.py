"""What the site makes from the code names everything there is, and its links lead to the right lines."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

import agents
import dpok_gym
from agents.cli.main import COMMANDS
from agents.common.metrics import METRICS
from docs.site.generated import GENERATORS, ROOT, expand, options_of
from dpok_gym.registration import ENVIRONMENTS, TASKS

API = ROOT / "docs" / "reference" / "api"


@pytest.fixture(scope="module")
def names_in_the_package() -> dict[str, list[str]]:
    """Built-in names, from a process of its own: other tests register more of them in this one."""
    code = (
        "import json, dpok_gym, agents; from dpok_gym.models.registry import list_models; "
        "print(json.dumps({'rewards': dpok_gym.list_rewards(), 'prompt-sets': dpok_gym.list_prompt_sets(), "
        "'algorithms': agents.list_algorithms(), 'presets': list(agents.PRESETS), 'models': list_models()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["rewards", "prompt-sets", "algorithms", "models"])
def test_tables_have_every_name(kind: str, names_in_the_package: dict[str, list[str]]) -> None:
    named = set(re.findall(r"`([^`]+)`", GENERATORS[kind]()))
    assert named >= set(names_in_the_package[kind])


def test_presets_and_environments_are_all_there(names_in_the_package: dict[str, list[str]]) -> None:
    assert re.findall(r"^### (.+)$", GENERATORS["presets"](), re.MULTILINE) == names_in_the_package["presets"]
    assert set(re.findall(r"`(DPOK-[\w-]+)`", GENERATORS["environments"]())) == ENVIRONMENTS.keys() - TASKS.keys()
    assert set(re.findall(r"`(DPOK-[\w-]+)`", GENERATORS["tasks"]())) == TASKS.keys()


def test_every_reward_and_algorithm_is_described() -> None:
    for row in GENERATORS["rewards"]().split("\n\n"):
        assert len(row.split("\n: ")[1]) > 20, row
    for row in GENERATORS["algorithms"]().splitlines()[2:]:
        assert len(row.split("|")[3]) > 20, row


def test_every_metric_has_a_section() -> None:
    text = GENERATORS["metrics"]()
    assert all(f"`{name}`" in text for name in METRICS)
    assert "### explained_variance\n" in text


@pytest.mark.slow
def test_commands_have_their_options() -> None:
    """Each option stands where people look for it."""
    text = GENERATORS["commands"]()
    assert re.findall(r"^## dpok (.+)$", text, re.MULTILINE) == list(COMMANDS)
    train = options_of("train")
    names = {title: {option.names[0] for option in options} for title, options in train.items()}
    assert "--resume" in names["The run"]
    assert "--prompts" in names["The environment"]
    assert "--lora-rank" in names["The policy"]
    assert "--learning-rate" in names["Every algorithm"]
    assert "--kl-coef" in names["DPOK: --algo dpok"]
    assert "--kl-coef" not in names["DDPO: --algo ddpo"]
    assert {option.names[0] for option in options_of("doctor")[""]} == {"--report"}
    for command in COMMANDS:
        assert all(option.help for options in options_of(command).values() for option in options), command


@pytest.mark.parametrize("package", [agents, dpok_gym])
def test_every_public_name_is_in_the_reference(package: object) -> None:
    name: str = package.__name__  # type: ignore[attr-defined]
    text = (API / f"{name}.md").read_text(encoding="utf-8")
    documented = re.findall(rf"\b{name}\.(\w+)", text) + re.findall(r"^## (\w+)$", text, re.MULTILINE)
    assert sorted(set(documented) - {"NAME"}) == sorted(package.__all__)  # type: ignore[attr-defined]


def test_a_link_leads_to_the_line() -> None:
    shown = GENERATORS["code"]("agents.algorithms.dpok:DPOK.loss", "loss + self.kl_coef * penalty")
    link = re.search(r"blob/\w+/(.+)#L(\d+)", shown)
    assert link is not None
    lines = (ROOT / link[1]).read_text(encoding="utf-8").splitlines()
    assert "loss + self.kl_coef * penalty" in lines[int(link[2]) - 1]
    marked = re.search(r":emphasize-lines: (\d+)\n\n(.*)```", shown, re.DOTALL)
    assert marked is not None
    assert "loss + self.kl_coef * penalty" in marked[2].splitlines()[int(marked[1]) - 1]
    assert '"""' not in shown


@pytest.mark.parametrize(("line", "message"), [("gone", "has 0 lines"), ("loss", r"has \d+ lines")])
def test_a_line_that_is_gone_stops_the_build(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(f"<!-- generate: code agents.algorithms.dpok:DPOK.loss|{line} -->")


def test_an_unknown_generator_stops_the_build() -> None:
    with pytest.raises(KeyError):
        expand("<!-- generate: poems -->")


def test_links_of_a_file_of_the_repository_lead_on() -> None:
    text = GENERATORS["file"]("benchmarks/README.md")
    assert not text.startswith("# ")
    assert "](../../benchmarks/results/steering.png)" in text
    assert re.search(r"\]\(https://github\.com/.*/blob/main/benchmarks/results/kill\.json\)", text)
    inside = re.findall(r"\]\((\.\./[^)#]+\.md)", text)
    assert inside
    assert all((ROOT / "docs" / "reference" / link).is_file() for link in inside)


def test_a_part_of_a_file_of_the_repository() -> None:
    part = GENERATORS["file"]("benchmarks/README.md", "Beside TRL")
    assert "side_by_side" in part
    assert "\n## " not in part
    with pytest.raises(ValueError, match="has no part 'Poems'; there are Results, "):
        expand("<!-- generate: file benchmarks/README.md|Poems -->")
