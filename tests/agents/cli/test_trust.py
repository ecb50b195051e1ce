"""Code that a run folder names: it does not run unless the reader of the folder says so."""

import shutil
import sys

import pytest
import yaml

from agents import load_run
from agents.cli.main import main
from tests.agents.cli.support import TINY, train

INTRUDER = """
from pathlib import Path

Path({trace!r}).touch()


def reward(images, prompts):
    return images.mean((1, 2, 3))
"""

#: For each kind of code: what it is called, where the config has it, and what stands there.
CODE = {
    "reward": (("env_kwargs", "reward"), {"intruder:reward": 1.0}, "the reward 'intruder:reward'"),
    "builtin": (("env_kwargs", "reward"), {"os:abort": 1.0}, "the reward 'os:abort'"),
    "held-out reward": (("algo_kwargs", "held_out_reward"), {"intruder:reward": 1}, "the reward 'intruder:reward'"),
    "held-out text": (("algo_kwargs", "held_out_reward"), "intruder:reward", "the reward 'intruder:reward'"),
    "model": (("env_kwargs", "model"), "intruder:reward", "the model 'intruder:reward'"),
    "pickle": (("env_kwargs", "model_kwargs"), {"allow_pickle": True}, "the model's allow_pickle"),
    "algorithm": (("algo",), "intruder:DPOK", "the algorithm 'intruder:DPOK'"),
    "environment": (("env",), "intruder:DPOK-Shapes-v0", "the environment 'intruder:DPOK-Shapes-v0'"),
}


@pytest.fixture
def intruder(tmp_path, monkeypatch):
    """The path of a file that is made when the module ``intruder``, in the working folder, is imported."""
    trace = tmp_path / "trace"
    (tmp_path / "intruder.py").write_text(INTRUDER.format(trace=str(trace)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("dpok_gym.rewards.registry._loaded", {})
    yield trace
    sys.modules.pop("intruder", None)


def _name_code(finished, folder, kind):
    """Makes a copy of a run whose config names code."""
    shutil.copytree(finished, folder)
    values = yaml.safe_load((folder / "config.yaml").read_text())
    *parents, last = CODE[kind][0]
    holder = values[parents[0]] if parents else values
    holder[last] = CODE[kind][1]
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


COMMANDS = {
    "evaluate": lambda run: ["evaluate", str(run), "--images", "1", "--device", "cpu"],
    "resume": lambda run: ["train", "--resume", "--out", str(run), "--images", "4"],
    "resume from": lambda run: ["train", "--resume-from-checkpoint", "latest", "--out", str(run)],
    "sample": lambda run: ["sample", "--prompt", "a red circle", "--n", "1", "--lora", str(run), "--device", "cpu"],
    "sample lora": lambda run: ["sample", "--prompt", "a red circle", "--n", "1", "--lora", str(run / "lora")],
}


@pytest.mark.parametrize("kind", CODE)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_code_that_a_config_names(finished, tmp_path, intruder, capsys, command, kind):
    run = _name_code(finished, tmp_path / "run", kind)
    assert main(COMMANDS[command](run)) == 2
    error = capsys.readouterr().err
    assert error.startswith("dpok: error: ")
    assert error.count("\n") == 1
    assert f"names code that would run: {CODE[kind][2]}; if you trust who wrote it, add --trust" in error
    assert "intruder" not in sys.modules
    assert not intruder.exists()


@pytest.mark.parametrize("kind", CODE)
def test_load_run_runs_no_code_that_a_config_names(finished, tmp_path, intruder, kind):
    run = _name_code(finished, tmp_path / "run", kind)
    sys.path.append(str(tmp_path))
    with pytest.raises(ValueError, match="names code that would run"):
        load_run(run, "cpu")
    assert not intruder.exists()


def test_with_trust_it_runs_and_is_named(finished, tmp_path, intruder, capsys):
    run = _name_code(finished, tmp_path / "run", "reward")
    assert main([*COMMANDS["evaluate"](run), "--trust"]) == 0
    assert f"trusting {run / 'config.yaml'}, which runs the reward 'intruder:reward'" in capsys.readouterr().err
    assert intruder.exists()
    assert load_run(run, "cpu", trust=True).images_drawn == 4
    assert main([*COMMANDS["resume"](run), "--images", "5", "--trust"]) == 0


def test_what_a_user_typed_is_trusted(tmp_path, intruder, capsys):
    options = ["--images", "2", "--target-modules", "attention", "--reward", "intruder:reward"]
    assert train(tmp_path / "run", *TINY, *options) == 0
    assert intruder.exists()
    # But a folder does not tell who wrote it.
    assert main(COMMANDS["evaluate"](tmp_path / "run")) == 2
    assert "--trust" in capsys.readouterr().err


def test_the_working_folder_is_searched_for_modules_that_were_typed_only(tmp_path, monkeypatch, intruder):
    """A folder of somebody else may hold a module that a library looks for."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    for words in (["evaluate"], ["--device", "cuda:0"], ["--reward", "http://host:80"], ["--out", "a:b.png"]):
        main(["train", "--no-such-option", *words])
        assert str(tmp_path) not in sys.path
    main(["train", "--no-such-option", "--reward", "shapes-quality=1,intruder:reward=0.5"])
    assert str(tmp_path) in sys.path
