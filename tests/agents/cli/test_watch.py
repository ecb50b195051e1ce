"""``dpok watch``: animations of the denoising and of the training."""

import shutil

import numpy as np
import pytest
from PIL import Image, ImageSequence

from agents.cli import animation
from agents.cli.animation import write_gif
from agents.cli.main import main
from tests.agents.cli.support import check_texts


@pytest.mark.slow
def test_a_run(finished, tmp_path, monkeypatch, capsys):
    """Both animations, and the page that shows them."""
    folder = shutil.copytree(finished, tmp_path / "run")
    written = {}

    def noted(rows, times, path, *arguments):
        written[path.name] = rows, times, arguments
        return write_gif(rows, times, path, *arguments)

    monkeypatch.setattr(animation, "write_gif", noted)
    assert main(["watch", str(folder), "--n", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("\n") >= 3
    rows, times, (title, captions, _) = written["denoising.gif"]
    assert list(rows) == [
        f"{model}:\n{what}" for model in ("pre-trained", "DPOK") for what in ("the state x_t", "x_0 expected")
    ]
    states, expected, after, _ = rows.values()
    assert states.shape == (3, 2, 64, 64, 3)  # before, between and after two steps
    assert np.array_equal(states[-1], expected[-1])
    assert np.array_equal(states[0], after[0])  # the same noise
    assert not np.array_equal(states[-1], after[-1])
    assert times == ["after 0 of 2 steps", "after 1 of 2 steps", "after 2 of 2 steps"]
    assert ("“three green squares”" in title, captions) == (True, ())
    (frames,), times, _ = written["training.gif"][0].values(), *written["training.gif"][1:]
    assert frames.shape == (2, 3, 64, 64, 3)
    assert times == ["after 0 images", "after 4 images"]
    sample = np.asarray(Image.open(folder / "samples" / "00002-4-images.png"))
    assert np.array_equal(np.concatenate(frames[1], axis=1), sample)
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/gif") == 2
    # A run that goes on has another model.
    assert main(["train", "--resume", "--out", str(folder), "--images", "6"]) == 0
    assert not list(folder.glob("*.gif"))
    assert "data:image/gif" not in (folder / "index.html").read_text(encoding="utf-8")


def test_frames(tmp_path, monkeypatch):
    figures = []
    canvas = animation.FigureCanvasAgg
    monkeypatch.setattr(animation, "FigureCanvasAgg", lambda figure: (figures.append(figure), canvas(figure))[1])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    images = np.tile(colours[:, None, None, None], (1, 2, 8, 8, 1))
    rows = {"pre-trained:\nthe state x_t": images, "DPOK:\nthe state x_t": images[::-1]}
    prompts = ["a purple triangle left of an orange square", "a red star"]
    path = write_gif(rows, ["first", "second", "last"], tmp_path / "a.gif", "a title", prompts)
    check_texts(figures[0])
    with Image.open(path) as opened:
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(opened)]
        assert opened.info["loop"] == 0
    assert len(frames) == 3
    for frame, (one, other) in zip(
        frames, zip(colours.astype(int), colours[::-1].astype(int), strict=True), strict=True
    ):
        for colour in (one, other):
            assert (abs(frame - colour).max(axis=2) < 40).sum() > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "9"], "--n must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--prompt", " "], "--prompt is blank"),
        (["--prompt", "a red cat"], "cat"),
    ],
)
def test_mistakes(finished, capsys, words, message):
    assert main(["watch", str(finished), *words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(finished.glob("*.gif"))
