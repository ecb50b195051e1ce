"""Recipes: files of options for ``dpok train --config``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents.cli.main import main
from agents.cli.train import parse
from agents.common.memory import Rehearsal
from benchmarks.memory import expect_recipe

RECIPES = sorted((Path(__file__).parents[3] / "benchmarks" / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
PAGE = (Path(__file__).parents[3] / "docs" / "guides" / "stable_diffusion.md").read_text(encoding="utf-8")
#: GB of the held-out reward that is taken where its files are on the disk: 428 million parameters of two bytes, with
#: the margin.
CLIP_SCORE = 428e6 * 2 * 1.1 / 1e9


def _write(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


def _config(*words: str) -> Any:
    return parse(list(words)).config


def test_a_recipe_is_read_as_the_command_line(tmp_path: Path) -> None:
    text = """
env: DPOK-SD15-v0
algo: grpo
learning-rate: 2e-4
precision: bfloat16
reward: {image-reward: 1.0, jpeg-compressibility: 0.5}
image-size: [256, 512]
model-kwargs: {vae_tiling: true, revision: main}
optimizer-kwargs: {betas: [0.9, 0.95]}
target-modules: [to_q, to_k]
gradient-checkpointing: false
batch-size: null
negative-prompt: -blurry, text
"""
    config = _config("--config", _write(tmp_path, text))
    assert (config.env, config.algo, config.preset) == ("DPOK-SD15-v0", "grpo", "published-model")
    assert config.algo_kwargs["learning_rate"] == 2e-4
    assert config.algo_kwargs["batch_size"] is None
    assert config.env_kwargs["reward"] == {"image-reward": 1.0, "jpeg-compressibility": 0.5}
    assert config.env_kwargs["image_size"] == [256, 512]
    assert config.env_kwargs["model_kwargs"] == {"vae_tiling": True, "revision": "main"}
    assert config.env_kwargs["negative_prompt"] == "-blurry, text"
    assert config.policy_kwargs["precision"] == "bfloat16"
    assert config.policy_kwargs["gradient_checkpointing"] is False
    assert config.policy_kwargs["optimizer_kwargs"] == {"betas": [0.9, 0.95]}
    assert config.policy_kwargs["target_modules"] == ["to_q", "to_k"]


def test_the_command_line_changes_a_recipe(tmp_path: Path) -> None:
    path = _write(tmp_path, "env: DPOK-SD15-v0\nalgo: grpo\nprecision: bfloat16\nseed: 3\nimages: 7\n")
    config = _config("--seed", "4", "--config", path, "--precision", "float32")
    assert (config.seed, config.images, config.policy_kwargs["precision"]) == (4, 7, "float32")
    other = _config("--config", path, "--env", "DPOK-SDXL-v0", "--algo", "dpok")
    assert (other.env, other.algo, other.images) == ("DPOK-SDXL-v0", "dpok", 7)
    assert _config("--config", _write(tmp_path, "preset: ddpo\n")).algo == "ddpo"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning-rat: 1e-4", "unknown option in {path} 'learning-rat'; did you mean 'learning-rate'?"),
        ("learning_rate: 1e-4", "unknown option in {path} 'learning_rate'; did you mean 'learning-rate'?"),
        ("algo: rwr\ngroup-size: 4", "unknown option in {path} 'group-size'"),
        ("trust: true", "unknown option in {path} 'trust'"),
        ("learning-rate: fast", "--learning-rate takes a number, not 'fast'"),
        ("env: DPOK-SD16-v0", "there is no environment 'DPOK-SD16-v0'"),
        ("- a list", "{path} is no recipe"),
        ("3: 4", "{path} is no recipe"),
        ("algo: [", "{path} is no YAML"),
        ("algo: no_such_module:Mine", "names code that would run: the algorithm 'no_such_module:Mine'"),
        ("reward: {my_rewards:mine: 1}", "names code that would run: the reward 'my_rewards:mine'"),
        ("reward: [my_rewards:mine]", "names code that would run: the reward 'my_rewards:mine'"),
        ("held-out-reward: my_rewards:mine", "names code that would run: the reward 'my_rewards:mine'"),
        ("model: my_models:make", "names code that would run: the model 'my_models:make'"),
        ("model-kwargs: {allow_pickle: true}", "names code that would run: the model's allow_pickle"),
        ("model-kwargs: allow_pickle=true", "names code that would run: the model's allow_pickle"),
        ("model-kwargs: [allow_pickle=true]", "names code that would run: the model's allow_pickle"),
        ("target-modules: [to_q, --reward=my_rewards:mine]", "a value of 'target-modules' in {path} looks like an"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    path = _write(tmp_path, text)
    assert main(["train", "--config", path, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert message.format(path=path) in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_where_a_recipe_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "there is no file" in capsys.readouterr().err
    path = _write(tmp_path, "seed: 3\n")
    assert main(["train", "--config", path, "--resume", "--out", str(tmp_path)]) == 2
    assert "leave out --config" in capsys.readouterr().err


def test_code_in_a_recipe_that_is_trusted(tmp_path: Path) -> None:
    path = _write(tmp_path, "reward: {tests.agents.cli.support:Brightness: 2}\n")
    config = _config("--config", path, "--trust")
    assert config.env_kwargs["reward"] == {"tests.agents.cli.support:Brightness": 2.0}
    harmless = _write(tmp_path, "seed: 3\n")  # the command line itself needs no trust
    config = _config("--config", harmless, "--reward", "tests.agents.cli.support:Brightness")
    assert config.env_kwargs["reward"] == {"tests.agents.cli.support:Brightness": 1.0}


# ---------------------------------------------------------------------------------------------- the published recipes


def test_there_is_one_for_each_size() -> None:
    assert NAMES == ["sd15-12gb", "sd15-24gb", "sd15-80gb", "sd15-8gb", "sdxl-12gb", "sdxl-24gb", "sdxl-80gb"]


@pytest.fixture(scope="module")
def quick_rehearsals() -> Iterator[None]:
    """Each model's passes are rehearsed once, with one element; test_memory.py shows that the others are multiples."""
    of_one: dict[tuple[Any, ...], int] = {}

    def quick(name: str) -> Any:
        rehearse = getattr(Rehearsal, name)

        def passes(rehearsal: Rehearsal, n: int, *args: Any, **settings: Any) -> int:
            key = name, rehearsal.model.text_width, args
            if key not in of_one:
                of_one[key] = rehearse(rehearsal, 1, *args, **settings)
            return n * of_one[key]

        return passes

    with pytest.MonkeyPatch.context() as patch:
        for name in ("update", "rollout", "decode"):
            patch.setattr(Rehearsal, name, quick(name))
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("quick_rehearsals")
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_it_fits_into_its_memory(path: Path) -> None:
    config = _config("--config", str(path))
    gigabytes, expected = int(re.findall(r"(\d+)gb", path.stem)[0]), expect_recipe(path) / 1e9
    assert 0.4 * gigabytes < expected < gigabytes - CLIP_SCORE
    assert re.search(rf"\| `{path.name}` .* \| {expected:.1f} \|\n", PAGE)
    # Rollouts and updates call the denoiser with equally many, so the first ratio is exactly 1.
    n = config.algo_kwargs["micro_batch_size"]
    assert n == config.policy_kwargs["max_batch_size"]
    assert config.algo_kwargs["batch_size"] % n == config.n_envs % n == 0


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_it_trains(path: Path, tmp_path: Path, tiny_sd_folder: Path, tiny_xl_folder: Path) -> None:
    model = tiny_xl_folder if "xl" in path.stem else tiny_sd_folder
    words = ["--config", str(path), "--model", str(model), "--reward", "jpeg-compressibility", "--prompts", "a dog"]
    words += ["--num-inference-steps", "2", "--images-per-iteration", "2", "--images", "2", "--eval-images", "1"]
    assert main(["train", *words, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "summary.json").is_file()
