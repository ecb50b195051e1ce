"""The command itself: help, version, errors, exit codes."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import dpok_gym
from agents.cli import main as command_line
from agents.cli.evaluate import Evaluate
from agents.cli.export import Export
from agents.cli.export_choices import ExportChoices
from agents.cli.fit_reward import FitReward
from agents.cli.import_choices import ImportChoices
from agents.cli.label import Label
from agents.cli.main import COMMANDS, main, parse
from agents.cli.sample import Sample
from agents.cli.serve_reward import ServeReward
from agents.cli.watch import Watch


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(argv, capsys):
    assert main(argv) == 0
    text = capsys.readouterr().out
    for name, (_, description) in COMMANDS.items():
        assert f"  {name} " in text
        assert description in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dpok {dpok_gym.__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize("argv", ["[]", "['--help']", "['--version']", "['sample', '--help']", "['trian']"])
def test_torch_is_not_loaded_before_it_is_needed(argv):
    check = f"""
import sys
from agents.cli.main import main
try:
    main({argv})
except SystemExit:
    pass
sys.exit(bool({{'torch', 'matplotlib'}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", check], check=False, capture_output=True).returncode == 0


@pytest.mark.slow
def test_python_m_agents(tmp_path):
    words = [sys.executable, "-m", "agents", "sample", "--prompt", "a red circle", "--n", "0", "--device", "cpu"]
    ended = subprocess.run(words, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "dpok: error: --n must be an integer of at least 1, got 0\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["evaluate", "nowhere"], "no run folder"),
        (["evaluate"], "FOLDER"),
        (["evaluate", "nowhere", "--image", "3"], "unknown option --image; did you mean '--images'?"),
        (["sample", "--prompt", "a red circle", "--lora", "nowhere"], "no LoRA"),
        (["sample", "--prompt", "a red cat"], "cat"),
        (["sample", "--prompt", "a red circle", "--n", "0"], "--n must be"),
        (["sample", "--prompt", "a red circle", "--n", "two"], "--n"),
        (["sample", "three", "squares"], "prompt"),
        (["serve-reward", "beauty"], "unknown reward 'beauty'"),
        (["serve-reward", "jpeg-compressibility", "--max-batch", "0"], "max_batch must be an integer of at least 1"),
        (["serve-reward", "jpeg-compressibility", "--port", "70000"], "--port must be from 0 to 65535"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("dpok: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_mistake_can_be_looked_into(monkeypatch):
    monkeypatch.setenv("DPOK_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["evaluate", "nowhere"])


def test_ctrl_c(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "parse", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "dpok: interrupted\n"


@pytest.fixture
def broken_pipe():
    """A pipe whose reader has gone, as head does when it has its lines."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_the_reader_of_a_pipe_may_go(monkeypatch, broken_pipe):
    """Whether that is seen while the command prints, or afterwards."""
    for run in (lambda options: os.write(broken_pipe, b"a line"), lambda options: print("a line") or 0):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", os.fdopen(broken_pipe, "w", closefd=False))
            patched.setattr("agents.cli.sample.run", run)
            assert main(["sample", "--prompt", "a star"]) == 0
            sys.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_process_whose_reader_has_gone(broken_pipe, unbuffered):
    words, env = [sys.executable, "-m", "agents", "--version"], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(words, check=False, stdout=broken_pipe, stderr=subprocess.PIPE, env=env)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("command", "options", "units"),
    [
        ("sample", Sample, ["1 or more", "0 or more"]),
        ("evaluate", Evaluate, ["1 or more"]),
        ("watch", Watch, ["1 to 8", "0 or more"]),
        ("export", Export, ["--no-figures"]),
        ("label", Label, ["even number", "[0, 1]", "0 or more", "DPOK_LABEL_TOKEN"]),
        ("import-choices", ImportChoices, ["label-studio", "FILE|FOLDER"]),
        ("export-choices", ExportChoices, ["label-studio", "empty or new"]),
        ("fit-reward", FitReward, ["1 or more", '"preferred": 0', "(0, 1)"]),
        ("serve-reward", ServeReward, ["1 or more"]),
    ],
)
def test_help_of_a_command(command, options, units, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    positional = {
        "evaluate": "run",
        "watch": "run",
        "export": "run",
        "serve-reward": "reward",
        "import-choices": "source",
    }
    positional |= dict.fromkeys(["fit-reward", "export-choices"], "choices")
    for field in dataclasses.fields(options):
        is_group = field.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(field.default_factory)
        is_positional = field.name == positional.get(command)
        assert is_group or is_positional or f"--{field.name.replace('_', '-')}" in text
    assert all(unit in text for unit in units)


def test_parse_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, options = parse(["sample", "--prompt", "a red circle", "--image-size", "64", "128"])
    assert (command, options.prompt, options.draw.image_size) == ("sample", "a red circle", (64, 128))
    command, options = parse(["train", "--seed", "3"])
    assert (command, options.config.seed) == ("train", 3)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes the module ``mine`` into the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("dpok_gym.rewards.registry._loaded", {})
    yield (tmp_path / "mine.py").write_text
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def reward(images, prompts):\n    raise ValueError('no\\nlight')",
            "the reward 'mine:reward' raised ValueError: no light; its own traceback follows",
        ),
        (
            "1 / 0",
            "the module of the reward 'mine:reward', read as 'module:name' (or is http:// missing?), raised Zero",
        ),
        ("def reward(): return 1 / 0", "the reward 'mine:reward' raised ZeroDivisionError: division by zero; its own"),
    ],
)
def test_a_reward_that_raises_keeps_its_traceback(mine, capsys, code, message):
    mine(code)
    words = ["sample", "--prompt", "a star", "--n", "1", "--num-inference-steps", "2", "--device", "cpu"]
    assert main([*words, "--steering", "best-of", "--n-particles", "2", "--reward", "mine:reward"]) == 1
    first, _, rest = capsys.readouterr().err.partition("\n")
    assert first.startswith(f"dpok: error: {message}")
    assert rest.startswith("Traceback")
    assert 'mine.py", line' in rest


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_full_memory_is_said_in_one_line(monkeypatch, capsys, error):
    def fails(argv):
        raise error

    monkeypatch.setattr(command_line, "parse", fails)
    assert main(["train"]) == 2
    assert capsys.readouterr().err.startswith("dpok: error: the device's memory is full; take fewer or smaller images")


def test_other_errors_are_not_hidden(monkeypatch):
    def fails(argv):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(command_line, "parse", fails)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["train"])
