"""``dpok doctor``: what it prints and writes, and its exit code."""

import json

import pytest

from agents.cli.doctor import parse
from agents.cli.main import main

OPTIONS = ["--num-inference-steps", "3", "--images-per-iteration", "4", "--lora-rank", "2", "--device", "cpu"]


def constant(images, prompts):
    return [1.0] * len(images)


def doctor(model, *options):
    """Runs ``dpok doctor`` on a tiny model."""
    words = ["--env", "DPOK-SD15-v0", "--model", str(model), "--guidance-scale", "1", "--no-use-critic"]
    return main(["doctor", *OPTIONS, *words, *options])


def test_a_sound_training(tiny_sd_folder, tmp_path, capsys):
    report = tmp_path / "report.json"
    options = ["--reward", "tests.support:redness", "--prompts", "a rabbit", "--learning-rate", "1e-3"]
    assert doctor(tiny_sd_folder, *options, "--report", str(report)) == 0
    printed = capsys.readouterr().out
    findings = json.loads(report.read_text())["findings"]
    assert "OK          prompts: 1, the longest with 4 of 40 tokens" in printed
    assert [finding["name"] for finding in findings if finding["status"] == "failed"] == []
    assert all(f"{finding['name']}: " in printed for finding in findings)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.slow
def test_a_training_that_would_be_wasted(tiny_sd_folder, capsys):
    options = ["--reward", "tests.agents.cli.test_doctor:constant", "--prompts", "a rabbit"]
    assert doctor(tiny_sd_folder, *options) == 1
    printed = capsys.readouterr().out
    assert "FAILED      reward: varies within a prompt" in printed
    assert "what to do: " in printed


@pytest.mark.slow
def test_prompts_that_are_too_long(tiny_sd_folder, tmp_path, capsys):
    """The training would refuse them; the check-up counts them, and goes on with the others."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a rabbit\n" + "long " * 60 + "\na dog\n" + "x" * 600 + "\na rabbit\n")
    options = ["--reward", "tests.support:redness", "--prompts", str(prompts)]
    assert doctor(tiny_sd_folder, *options) == 1
    printed = capsys.readouterr().out
    assert "FAILED      prompts: 5, " in printed
    assert "2 too long; 2 refused; 1 copies" in printed
    assert "the first one that is refused is number 2: a prompt has" in printed
    assert printed.count(" prompts: ") == 1
    assert "throughput" in printed
    assert doctor(tiny_sd_folder, *options, "--long-prompts", "skip", "--report", str(tmp_path / "report.json")) == 0
    finding = json.loads((tmp_path / "report.json").read_text())["findings"][0]
    assert finding["status"] == "warning"
    assert "2 too long; 0 refused" in finding["measured"]
    capsys.readouterr()
    prompts.write_text("x" * 600)
    assert doctor(tiny_sd_folder, *options) == 1
    assert "throughput" not in capsys.readouterr().out


def test_the_options_are_those_of_train(tmp_path):
    options = parse(["--algo", "grpo", "--report", "r.json", "--learning-rate", "0.5"])
    assert options.config.algo == "grpo"
    assert options.config.algo_kwargs["learning_rate"] == 0.5
    assert str(options.report) == "r.json"
    assert str(parse(["--report=r.json"]).report) == "r.json"
    assert parse([]).report is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "folder"], "leave out --out, --resume and --dry-run"),
        (["--dry-run"], "leave out --out, --resume and --dry-run"),
        (["--learning-rat", "1"], "--learning-rate"),
        (["--report"], "--report needs a value"),
    ],
)
def test_wrong_input(options, message, capsys):
    """As everywhere, one line and the exit code 2."""
    assert main(["doctor", *OPTIONS, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_word_that_the_model_does_not_know(capsys):
    assert main(["doctor", *OPTIONS, "--prompts", "a purple rabbit"]) == 1
    assert "cannot read 'rabbit' in the prompt" in capsys.readouterr().out


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "dpok doctor" in printed
    assert "--report" in printed
    assert "--learning-rate" in printed
