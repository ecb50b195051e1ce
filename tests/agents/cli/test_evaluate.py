"""``dpok evaluate``."""

import json
import shutil

import pytest

from agents.cli.main import main
from tests.agents.cli.support import read_summary


@pytest.mark.slow
def test_evaluate(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert main(["evaluate", str(folder), "--images", "3", "--device", "cpu"]) == 0
    written = json.loads((folder / "evaluation.json").read_text())
    assert (written["seed"], written["images"]) == (1, 3)
    assert written["trained_on"] == ["shapes-alignment", "shapes-quality"]
    summary = read_summary(folder)
    training, held_out = written["prompts"]["training"], written["prompts"]["held-out"]
    for name in ("aligned_after", "quality_after", "reward_before", "kl_to_pretrained"):  # of the same seeds
        assert training[name] == pytest.approx(summary[name], rel=1e-3)
    assert held_out["n_prompts"] >= 14
    assert set(held_out["rewards_after"]) == {"shapes-alignment", "shapes-quality", "shapes-preference"}
    out = capsys.readouterr().out
    assert "held-out prompts" in out
    assert "nats" in out


@pytest.mark.slow
def test_other_seeds_and_rewards(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    words = ["evaluate", str(folder), "--images", "2", "--device", "cpu", "--seed", "5"]
    assert main([*words, "--reward", "jpeg-compressibility"]) == 0
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["seed"] == 5
    training = written["prompts"]["training"]
    assert set(training["rewards_after"]) == {"shapes-alignment", "shapes-quality", "jpeg-compressibility"}
    summary = read_summary(folder)
    assert training["quality_before"] != pytest.approx(summary["quality_before"], rel=1e-6)


def test_weights_of_further_rewards_are_refused(finished, capsys):
    words = ["evaluate", str(finished), "--images", "1", "--device", "cpu", "--reward", "jpeg-compressibility=2"]
    assert main(words) == 2
    assert "--reward takes names without weights here" in capsys.readouterr().err
    assert not (finished / "evaluation.json").exists()


@pytest.mark.slow
def test_a_run_without_a_checkpoint(finished, tmp_path, capsys):
    shutil.copy(finished / "config.yaml", tmp_path)
    assert main(["evaluate", str(tmp_path), "--device", "cpu"]) == 2
    assert "has no checkpoint: the run ended before the first one" in capsys.readouterr().err
