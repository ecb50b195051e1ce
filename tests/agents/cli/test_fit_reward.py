"""``dpok fit-reward``, from a file of choices to a reward that can be trained with."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from agents.cli import plots
from agents.cli.fit_reward import FitReward
from agents.cli.main import main
from benchmarks.kill import fingerprint, make_choices
from dpok_gym.rewards import make_reward
from dpok_gym.rewards.preference.fit import Measured, fit
from dpok_gym.rewards.preference.reward import LearnedReward
from dpok_gym.rewards.registry import load_reward
from tests.agents.cli.support import check_texts, read_summary, train
from tests.dpok_gym.rewards.preference.support import save_clip

QUICK = ["--epochs", "2", "--held-out", "0.2", "--image-size", "16", "--batch-size", "8", "--device", "cpu"]
WRITTEN = {"config.json", "model.safetensors", "fit.json", "calibration.png"}


@pytest.fixture
def choices(tmp_path):
    """Forty choices of the brighter image of two."""
    return make_choices(tmp_path)


@pytest.mark.slow
def test_a_reward_is_fitted(choices, tmp_path, capsys):
    out = tmp_path / "reward"
    assert main(["fit-reward", str(choices), "--out", str(out), *QUICK]) == 0
    assert {path.name for path in out.iterdir()} == WRITTEN
    printed = capsys.readouterr().out
    fitted = json.loads((out / "fit.json").read_text())
    held_out = Measured(**fitted["held_out"])
    assert (fitted["trained_on"], held_out.choices) == (32, 8)
    assert f"agreement {held_out.agreement:.1%}" in printed
    assert "40 choices between 80 images, 0 of them ties" in printed
    assert f"({held_out.interval[0]:.0%} to" in printed.replace("95 % interval ", "")
    assert "there are no repeats of a choice" in printed
    assert "predicted" in printed
    assert Image.open(out / "calibration.png").size[0] > 500
    batch = make_reward(str(out))(torch.rand(3, 3, 64, 64), ["a bright day", "a dark day", ""])
    assert batch.total.isfinite().all()

    assert main(["fit-reward", str(choices), "--out", str(out), *QUICK]) == 2
    assert "already holds a reward; choose another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_it_goes_on_from_a_reward(choices, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    main(["fit-reward", str(choices), "--out", str(first), *QUICK])
    arguments = ["fit-reward", str(choices), "--out", str(second), "--start", str(first), "--learning-rate", "1e-12"]
    assert main([*arguments, "--image-size", "24"]) == 2
    assert "takes images of 16 pixels" in capsys.readouterr().err
    assert main([*arguments, "--held-out", "0.2", "--epochs", "1", "--device", "cpu"]) == 0
    images, prompts = torch.rand(3, 3, 16, 16), ["a bright day"] * 3
    one, other = (make_reward(str(folder))(images, prompts).total for folder in (first, second))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_it_goes_on_from_the_shipped_reward(choices, tmp_path):
    out = tmp_path / "reward"
    shipped: Any = load_reward("shapes-preference")
    before = {name: value.clone() for name, value in shipped.learned().items()}
    words = ["fit-reward", str(choices), "--out", str(out), "--start", "shapes-preference", "--device", "cpu"]
    assert main([*words, "--epochs", "1", "--held-out", "0.2"]) == 0
    assert LearnedReward.load(out).config() == shipped.config()
    for name, value in shipped.learned().items():
        assert torch.equal(value, before[name])  # others still get the shipped one


@pytest.mark.slow
def test_a_head_on_clip_is_fitted(choices, tmp_path, capsys):
    clip, out = save_clip(tmp_path / "clip"), tmp_path / "reward"
    words = ["fit-reward", str(choices), "--network", "clip", "--clip", str(clip), "--out", str(out)]
    assert main([*words, "--epochs", "3", "--device", "cpu"]) == 0
    assert {path.name for path in out.iterdir()} == WRITTEN
    assert json.loads((out / "config.json").read_text()) == {"network": "clip", "clip": str(clip), "lora_rank": 0}
    made = make_reward(str(out))
    made.check_differentiable()
    assert made(torch.rand(2, 3, 64, 64), ["a bright day", "x"]).total.isfinite().all()
    capsys.readouterr()
    for mistake, message in [
        (["--start", str(out), "--lora-rank", "4"], "has a network; leave out --network, --clip and --lora-rank"),
        (["--start", "jpeg-compressibility"], "it was not learned from choices"),
        (["--start", str(tmp_path / "nowhere")], "holds no reward"),
        (["--clip", str(clip)], "--clip and --lora-rank need --network clip"),
        (["--network", "clip", "--clip", str(clip), "--image-size", "64"], "takes images of 32 pixels"),
        (
            ["--network", "clip", "--clip", str(tmp_path / "nowhere")],
            "a CLIP model of the reward 'clip': there is no file",
        ),
    ]:
        assert main(["fit-reward", str(choices), "--out", str(tmp_path / "other"), *mistake]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_agreement_of_people_with_themselves(choices, tmp_path, capsys):
    rows = [json.loads(line) | {"id": str(k)} for k, line in enumerate(choices.read_text().splitlines())]
    again = [row | {"id": f"{row['id']} again", "repeat_of": row["id"]} for row in rows[:10]]
    again[0]["preferred"] = 1 - again[0]["preferred"]
    tie = rows[0] | {"id": "tie", "preferred": None, "reason": "tie"}
    choices.write_text("\n".join(map(json.dumps, [*rows, *again, tie])))
    out = tmp_path / "reward"
    assert main(["fit-reward", str(choices), "--out", str(out), *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "51 choices between 80 images, 1 of them ties" in printed
    assert "people agree with themselves in 90.0% of 10 repeats without ties (60% to 98%)" in printed
    assert "in 95% at most" in printed
    repeats = json.loads((out / "fit.json").read_text())["repeats"]
    assert (repeats["repeats"], repeats["agreement"]) == (10, 0.9)


@pytest.mark.slow
def test_it_can_be_trained_with(choices, tmp_path):
    out = tmp_path / "reward"
    main(["fit-reward", str(choices), "--out", str(out), *QUICK])
    settings = ["--images", "2", "--images-per-iteration", "2", "--num-inference-steps", "2", "--eval-images", "2"]
    assert train(tmp_path / "run", "--reward", str(out), "--device", "cpu", *settings) == 0
    assert str(out) in read_summary(tmp_path / "run")["rewards_after"]


@pytest.mark.slow
def test_ctrl_c_keeps_the_best_so_far(choices, tmp_path, monkeypatch):
    def interrupted(*args, log, **settings):
        def log_and_stop(row):
            log(row)
            raise KeyboardInterrupt

        return fit(*args, log=log_and_stop, **settings)

    out, words = tmp_path / "reward", ["fit-reward", str(choices), *QUICK]
    with monkeypatch.context() as patched:
        patched.setattr("dpok_gym.rewards.preference.fit.fit", interrupted)
        assert main([*words, "--out", str(out)]) == 130
    assert {path.name for path in out.iterdir()} == WRITTEN | {"checkpoint.safetensors"}
    fitted = json.loads((out / "fit.json").read_text())
    assert (fitted["epoch"], fitted["interrupted"]) == (1, True)
    make_reward(str(out))  # it can be used
    # The same command goes on, and ends as a fit that was not interrupted.
    assert main([*words, "--out", str(out)]) == 0
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert fingerprint(out) == fingerprint(tmp_path / "whole")


@pytest.mark.slow
def test_a_figure_that_is_missing_is_drawn(choices, tmp_path, capsys):
    out = tmp_path / "reward"
    words = ["fit-reward", str(choices), "--out", str(out), *QUICK]
    assert main(words) == 0
    whole = fingerprint(out)
    (out / "calibration.png").unlink()
    assert main(words) == 0
    assert fingerprint(out) == whole
    (out / "calibration.png").unlink()
    (out / "fit.json").write_text("{")
    assert main(words) == 2
    assert "already holds a reward" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_checkpoint(choices, tmp_path, capsys):
    out = tmp_path / "reward"
    out.mkdir()
    (out / "checkpoint.safetensors").write_bytes(bytes(1000))
    assert main(["fit-reward", str(choices), "--out", str(out), *QUICK]) == 2
    error = capsys.readouterr().err
    assert "checkpoint.safetensors is damaged" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--held-out", "1"], "held-out share must lie in (0, 1)"),
        (["--image-size", "20"], "image size must be a multiple of 8"),
        (["--epochs", "0"], "epochs must be an integer of at least 1"),
        (["--seed", "-1"], "--seed must be an integer of at least 0"),
    ],
)
def test_mistakes_are_said_and_nothing_is_written(choices, tmp_path, capsys, options, message):
    assert main(["fit-reward", str(choices), "--out", str(tmp_path / "reward"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "reward").exists()


def test_mistakes_in_the_file(choices, tmp_path, capsys):
    (tmp_path / "3-a.png").unlink()
    assert main(["fit-reward", str(choices), "--out", str(tmp_path / "reward")]) == 2
    captured = capsys.readouterr().err
    assert "line 4 of" in captured
    assert captured.count("\n") == 1


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main(["fit-reward", "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(FitReward):
        assert field.name == "choices" or f"--{field.name.replace('_', '-')}" in text
    assert '"preferred": 0' in text


@pytest.mark.slow
def test_calibration_figure(tmp_path, monkeypatch):
    kept = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (kept.append(figure), save(figure, path))[1])
    measured = Measured(100, 0, 0.81, [0.72, 0.88], 0.4, 0.02, [0.55, 0.75, 0.95], [0.5, 0.8, 1.0], [20, 30, 50])
    assert plots.calibration(measured, tmp_path / "calibration.png", "100 choices held out").is_file()
    curve, counts = kept[0].axes
    np.testing.assert_allclose(curve.containers[0].lines[0].get_data(), [measured.predicted, measured.observed])
    assert [bar.get_height() for bar in counts.patches] == measured.counts
    assert "81.0%" in kept[0].get_suptitle()
    check_texts(kept[0])
