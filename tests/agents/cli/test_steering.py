"""The options of steering, and what ``dpok sample`` and ``dpok evaluate`` do with them."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from agents import SVDD, BestOf, FKSteering
from agents.cli.arguments import UsageError
from agents.cli.main import main
from agents.cli.sample import parse
from agents.cli.steering import describe_steering, make_steering
from agents.common.steering import UNSTEERED


def _steering(*words):
    return make_steering(parse(["--prompt", "a red circle", *words]).steer)


def test_options():
    assert _steering() == UNSTEERED
    assert _steering("--steering", "best-of") == BestOf(8)
    assert _steering("--steering", "best-of", "--n-particles", "4") == _steering("--best-of", "4") == BestOf(4)
    assert _steering("--steering", "svdd", "--temperature", "0.2", "--resample-every", "2") == SVDD(8, 0.2, 2)
    words = ["--temperature", "inf", "--potential", "max", "--ess-threshold", "0.5", "--choice", "draw"]
    expected = FKSteering(8, float("inf"), potential="max", ess_threshold=0.5, choice="draw")
    assert _steering("--steering", "fk", *words) == expected


def test_the_defaults_of_the_help_are_those_of_the_methods(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    fk = FKSteering()
    for name in ("n_particles", "resample_every", "potential", "ess_threshold", "choice"):
        default = getattr(fk, name)
        shown = default if isinstance(default, str) else f"{default:g}"
        _, _, after = text.partition(f"--{name.replace('_', '-')} ")
        assert re.search(r"\(default: (.*?)\)", after).group(1) == shown
        assert all(getattr(method, name, default) == default for method in (SVDD(), BestOf()))
    assert f"(default: fk {fk.temperature:g}, svdd {SVDD().temperature:g})" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n-particles", "4"], "--n-particles needs --steering best-of, fk, svdd"),
        (["--steering", "svdd", "--potential", "max"], "--steering svdd has no --potential; it has --n-particles, "),
        (["--best-of", "4", "--n-particles", "2"], "--best-of is a way of steering by itself; leave out --n-particles"),
        (["--steering", "best-of", "--temperature", "1"], "best-of has no --temperature; it has --n-particles$"),
    ],
)
def test_options_that_a_method_does_not_have(words, message):
    with pytest.raises(UsageError, match=message):
        _steering(*words)


def test_a_reward_without_steering(capsys):
    assert main(["sample", "--prompt", "a red circle", "--reward", "shapes-quality"]) == 2
    assert "--reward is what --best-of or --steering chooses by" in capsys.readouterr().err


def test_description():
    described = describe_steering(FKSteering(4, 0.1, resample_every=2), 10)
    assert json.loads(json.dumps(described)) == {
        "method": "FKSteering",
        "n_particles": 4,
        "temperature": 0.1,
        "resample_every": 2,
        "potential": "difference",
        "ess_threshold": 1.0,
        "choice": "best",
        "denoiser_calls": 40,
        "reward_calls": 24,
    }


@pytest.mark.slow
def test_sample(finished, tmp_path, capsys):
    """The reward is the run's, or that of the options; a prompt that the judge cannot read needs another one."""
    words = ["sample", "--prompt", "a red circle", "--n", "2", "--device", "cpu", "--num-inference-steps", "2"]
    drawn = []
    for name, options in {
        "alone": [],
        "best": ["--best-of", "8"],
        "small": ["--steering", "svdd", "--n-particles", "3", "--reward", "jpeg-compressibility"],
        "run": ["--steering", "fk", "--n-particles", "2", "--lora", str(finished)],
    }.items():
        out = tmp_path / f"{name}.png"
        assert main([*words, *options, "--out", str(out)]) == 0
        assert "of them fully aligned" in capsys.readouterr().out
        drawn.append(np.asarray(Image.open(out)).astype(int))
    alone, best, small, _ = drawn
    assert np.abs(best - alone).max() > 1
    assert np.abs(small - alone).max() > 1
    unread = [*words, "--prompt", "circle", "--steering", "best-of", "--n-particles", "2"]
    assert main([*unread, "--reward", "jpeg-compressibility", "--out", str(tmp_path / "unread.png")]) == 0


@pytest.mark.slow
def test_evaluate(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    words = ["evaluate", str(folder), "--images", "3", "--device", "cpu"]
    written = []
    for options in ([], ["--steering", "best-of", "--n-particles", "2"]):
        assert main([*words, *options]) == 0
        written.append(json.loads((folder / "evaluation.json").read_text()))
    assert "each image took 4 calls of the denoiser, and the reward of 2 images" in capsys.readouterr().out
    alone, best = written
    assert alone["steering"] == {"method": "BestOf", "n_particles": 1, "denoiser_calls": 2, "reward_calls": 1}
    assert best["steering"] == {"method": "BestOf", "n_particles": 2, "denoiser_calls": 4, "reward_calls": 2}
    for when in ("before", "after"):
        assert best["prompts"]["training"][f"reward_{when}"] > alone["prompts"]["training"][f"reward_{when}"]
