"""docs/guides/from_choices.md: its five steps, by a simulated person with a browser, with few images."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import pytest
import torch
from PIL import Image

from agents.cli.main import main
from dpok_gym.choices.records import read_choices
from dpok_gym.shapes.captions import parse_prompt
from dpok_gym.shapes.choices import utilities
from tests.browser import finish, serving, visiting

PAGE = (Path(__file__).parent.parent / "docs" / "guides" / "from_choices.md").read_text(encoding="utf-8")
#: What makes each step short: options that come after the page's, so that they count.
FEW = {
    "label --prompts": "--images 48",
    "label --out": "",
    "fit-reward": "--epochs 8",
    "train": "--n-gradient-steps 4 --n-envs 16 --eval-images 16",
    "label --run": "--images 4",
}


def commands() -> list[list[str]]:
    """Returns the words of the page's five commands, with few images."""
    (block,) = re.findall(r"## Five steps\n\n```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = [line.removeprefix("dpok ") for line in block.splitlines()]
    assert len(lines) == len(FEW)
    for line, beginning in zip(lines, FEW, strict=True):
        assert line.startswith(beginning)
    return [shlex.split(f"{line} {few}") for line, few in zip(lines, FEW.values(), strict=True)]


def choose_all(page: Any, prompt: str) -> None:
    """Answers every pair like a person who looks at the images: by the judge of the shapes world."""
    done = 0
    while page.locator("#choose").count():
        seen = []
        for image in page.locator("#choose img").all():
            answer = page.request.get(urljoin(page.url, image.get_attribute("src")))
            pixels = np.array(Image.open(io.BytesIO(answer.body())).convert("RGB"))
            seen.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
        left, right = utilities(torch.stack(seen), [parse_prompt(prompt)])[0].tolist()
        page.keyboard.press("ArrowUp" if left == right else "ArrowLeft" if left > right else "ArrowRight")
        done += 1
        page.get_by_text(re.compile(f"^{done} done, |^All done")).wait_for()
        page.wait_for_load_state()


@pytest.mark.slow
def test_from_choices_to_a_model(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    choose, report, fit, train, check = commands()
    prompt = choose[choose.index("--prompts") + 1]

    with serving(choose[1:]) as (_, address), visiting(browser, address) as page:
        choose_all(page, prompt)
        finish(page)
        written = page.locator("pre").inner_text()
    choices = read_choices("choices/choices.jsonl")
    repeats = [choice for choice in choices if choice.repeat_of is not None]
    assert (len(choices), len(repeats)) == (26, 2)
    assert shlex.split(written)[1:] == fit[: fit.index("--epochs")]  # the page says how to go on

    assert main(report) == 0
    assert "2 of 2, 100%" in capsys.readouterr().out
    assert main(fit) == 0
    assert json.loads(Path("my_reward/fit.json").read_text())["repeats"]["agreement"] == 1.0
    assert main(train) == 0
    summary = json.loads(Path("runs/mine/summary.json").read_text())
    assert (summary["interrupted"], summary["pictures"]) == (False, 0)
    with Image.open("runs/mine/before_after.png") as figure:
        assert len(figure.convert("RGB").getcolors(figure.width * figure.height)) > 100  # it is not empty

    with serving(check[1:]) as (_, address), visiting(browser, address) as page:
        choose_all(page, prompt)
        finish(page)
    capsys.readouterr()
    assert main(["label", "--out", "check", "--report"]) == 0
    assert "runs/mine" in capsys.readouterr().out
