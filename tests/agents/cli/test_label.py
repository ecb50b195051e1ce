"""``dpok label``: what it draws, what it refuses, how it resumes, and how it ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agents.cli import label
from agents.cli.environments import make_env
from agents.cli.main import main
from agents.common.evaluation import sample_images
from dpok_gym.choices.pairs import read_pairs
from tests.dpok_gym.choices.support import answer, make_pairs, make_session
from tests.support import ending

#: Options that draw quickly.
QUICK = ["--num-inference-steps", "2", "--device", "cpu"]


@pytest.fixture
def served(monkeypatch):
    """The sessions that would be served; the server ends at once."""
    sessions = []
    original = label._serve

    def run_server(app, host, port, ready, **settings):
        ready(f"http://{host}:{port}", host == "127.0.0.1")

    def serve(options, pairs, token):
        sessions.append((options, pairs, token))
        return original(options, pairs, token)

    monkeypatch.setattr("dpok_gym.utils.serving.run_server", run_server)
    monkeypatch.setattr(label, "_serve", serve)
    return sessions


def draw(out, *words):
    return main(["label", "--out", str(out), "--no-open", *words])


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
def test_pairs_of_the_pre_trained_model(tmp_path, served, capsys):
    words = ["--prompts", "a red circle", "--seed", "3", *QUICK]
    assert draw(tmp_path / "out", "--images", "6", *words) == 0
    printed = capsys.readouterr().out
    assert "3 pairs, 0 choices so far; the page: http://127.0.0.1:8100 (Ctrl-C ends it)" in printed
    assert "0 new choices" in printed
    pairs = read_pairs(tmp_path / "out")
    assert {pair.prompt for pair in pairs} == {"a red circle"}
    assert [[origin["seed"] for origin in pair.origins] for pair in pairs] == [[3, 4], [5, 6], [7, 8]]
    assert all(origin["run"] is None and origin["model"] == "shapes" for pair in pairs for origin in pair.origins)
    env = make_env("DPOK-Shapes-v0", 1, num_inference_steps=2, device="cpu")
    alone = sample_images(env.process, env, ["a red circle"], seed=6)
    assert np.abs(pixels(pairs[1].images[1]) - alone.images[0]).max() <= 1  # of 255
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()}
    assert draw(tmp_path / "out", "--images", "6", *words) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()} == before
    assert draw(tmp_path / "out") == 0  # goes on without an option of drawing
    assert draw(tmp_path / "out", "--images", "10", *words) == 0
    assert read_pairs(tmp_path / "out")[:3] == pairs
    assert len(read_pairs(tmp_path / "out")) == 5
    assert draw(tmp_path / "out", "--images", "4", *words) == 2
    assert "was begun with images 10, and not 4" in capsys.readouterr().err


@pytest.mark.slow
def test_a_drawing_that_was_killed_goes_on(tmp_path, served, monkeypatch, capsys):
    monkeypatch.setattr("agents.cli.pair_drawing.EVALUATION_BATCH_SIZE", 2)
    words = ["--prompts", "colour", "--images", "8", *QUICK]
    assert draw(tmp_path / "whole", *words) == 0
    saved: list[object] = []

    def save_some(self, *args, save=Image.Image.save, **kwargs):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(args[0])
        return save(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save_some)
        assert draw(tmp_path / "killed", *words) == 130
    assert draw(tmp_path / "killed") == 2
    assert "repeat the command that began them" in capsys.readouterr().err
    assert draw(tmp_path / "killed", "--prompts", "a red circle", "--images", "8", *QUICK) == 2
    assert "was begun with prompts" in capsys.readouterr().err
    assert draw(tmp_path / "killed", *words) == 0
    whole, resumed = read_pairs(tmp_path / "whole"), read_pairs(tmp_path / "killed")
    assert [(pair.prompt, pair.sha256, pair.origins) for pair in whole] == [
        (pair.prompt, pair.sha256, pair.origins) for pair in resumed
    ]
    assert len({pair.prompt for pair in whole}) > 1


@pytest.mark.slow
def test_a_run_against_the_pre_trained_model(finished, tmp_path, served):
    out = tmp_path / "out"
    assert draw(out, "--run", str(finished), "--images", "4", "--seed", "5", *QUICK) == 0
    pairs = read_pairs(out)
    for k, pair in enumerate(pairs):
        assert [origin["seed"] for origin in pair.origins] == [5 + k, 5 + k]
        assert [origin["run"] for origin in pair.origins] == [None, finished.as_posix()]
        assert [origin["step"] for origin in pair.origins] == [0, 4]
        assert 0 < np.abs(pixels(pair.images[0]) - pixels(pair.images[1])).mean() < 40  # alike, from the same noise
    assert {pair.prompt for pair in pairs} == {"three green squares"}  # those of the run
    session = make_session(out, repeats=0)
    for _ in range(2):
        answer(session, "ada", "left" if session.question("ada").left else "right")  # the run wins each time
    assert draw(out, "--report") == 0


@pytest.mark.slow
def test_two_runs(finished, tmp_path, served, capsys):
    assert draw(tmp_path / "out", "--run", str(finished), str(finished), "--images", "2", *QUICK) == 2
    assert "two different ones" in capsys.readouterr().err
    other = tmp_path / "other"
    other.symlink_to(finished, target_is_directory=True)
    assert draw(tmp_path / "out", "--run", str(finished), str(other), "--images", "2", *QUICK) == 0
    (pair,) = read_pairs(tmp_path / "out")
    assert [origin["run"] for origin in pair.origins] == [finished.as_posix(), other.as_posix()]
    assert np.abs(pixels(pair.images[0]) - pixels(pair.images[1])).max() <= 1


def test_images_that_are_there(tmp_path, served, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for k in range(4):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(source / f"{k}.png")
    (source / "prompts.csv").write_text("file,prompt\n" + "".join(f"{k}.png,a dog\n" for k in range(4)))
    assert draw(tmp_path / "out", "--images-from", str(source)) == 0
    assert len(read_pairs(tmp_path / "out")) == 2
    moved = (source / "prompts.csv").rename(tmp_path / "table.csv")
    assert draw(tmp_path / "other", "--images-from", str(source)) == 2
    assert "has no table of prompts" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert draw(tmp_path / "other", "--images-from", str(source), "--prompts", str(moved)) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--prompts is missing"),
        (["--images", "3", "--prompts", "a red circle"], "--images must be even"),
        (["--images", "0", "--prompts", "a red circle"], "--images must be an integer of at least 2"),
        (["--prompts", "a red dragon", "--device", "cpu"], "dragon"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["--run", "nowhere"], "nowhere is no run folder"),
        (["--run", "a", "b", "c"], "--run takes one run"),
        (["--images-from", "nowhere"], "nowhere has no table of prompts"),
        (["--images-from", "nowhere", "--run", "a"], "leave out --run"),
        (["--images-from", "nowhere", "--model", "sd15"], "leave out --model"),
        (["--images-from", "nowhere", "--images", "4"], "leave out --images"),
        (["--prompts", "a red circle", "--repeats", "2"], "--repeats must lie in [0, 1]"),
        (["--prompts", "a red circle", "--shared", "-1"], "--shared must lie in [0, 1]"),
        (["--prompts", "a red circle", "--port", "65536"], "--port must be an integer of at most 65,535"),
        (["--prompts", "a red circle", "--host", " "], "must name a network interface"),
        (["--prompts", "a red circle", "--token", "SEC RET"], "the token must be one or more visible ASCII characters"),
        (["--report"], "there is no file of choices"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert draw("out", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "SEC" not in error
    assert error.count("dpok: error: ") == 1
    assert not list(tmp_path.iterdir())


def test_an_option_that_would_have_no_effect(tmp_path, capsys):
    make_pairs(tmp_path, 1)
    assert draw(tmp_path, "--images", "10") == 2
    assert "--images needs --prompts or --run too" in capsys.readouterr().err


def test_one_folder_has_one_server(tmp_path, monkeypatch, capsys):
    make_pairs(tmp_path, 1)

    def run_server(*args, **kwargs):
        assert draw(tmp_path) == 2
        assert "another process is writing to" in capsys.readouterr().err

    monkeypatch.setattr("dpok_gym.utils.serving.run_server", run_server)
    assert draw(tmp_path) == 0


def test_the_token_is_in_the_address_that_is_printed(tmp_path, served, monkeypatch, capsys):
    make_pairs(tmp_path, 1)
    monkeypatch.setenv("DPOK_LABEL_TOKEN", "a+b")
    assert draw(tmp_path) == 0
    assert "http://127.0.0.1:8100/?token=a%2Bb" in capsys.readouterr().out
    assert served[0][2] == "a+b"
    assert "SECRET" not in repr(label.parse(["--token", "SECRET"]))


@pytest.mark.parametrize(
    ("words", "is_open"), [([], False), (["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--token", "A"], False)]
)
def test_an_open_port_is_said(tmp_path, served, capsys, words, is_open):
    make_pairs(tmp_path, 1)
    assert draw(tmp_path, *words) == 0
    warning = "everyone who reaches this port can choose; --token lets in those who have it\n"
    assert capsys.readouterr().err == (warning if is_open else "")


@pytest.mark.parametrize(
    ("platform", "variables", "opened"), [("darwin", {}, 1), ("linux", {}, 0), ("linux", {"DISPLAY": ":0"}, 1)]
)
def test_the_page_opens_where_there_is_a_screen(tmp_path, served, monkeypatch, platform, variables, opened):
    make_pairs(tmp_path, 1)
    pages: list[str] = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("webbrowser.open", pages.append)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["label", "--out", str(tmp_path)]) == 0
    assert pages == ["http://127.0.0.1:8100"] * opened


def test_the_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    make_pairs(tmp_path, 4, "a [red] star", (None, "runs/[mine]"))
    session = make_session(tmp_path, repeats=1)
    for verdict in ("left", "right", "tie", "skip", "left", "left", "left"):
        answer(session, "ada", verdict)
    assert draw(tmp_path, "--report") == 0
    text = capsys.readouterr().out
    for part in ("runs/[mine]", "a [red] star", "of 3,", "same answer again", "win rate", "ada: tie"):
        assert part in text
    (tmp_path / "choices.jsonl").write_text("")
    assert draw(tmp_path, "--report") == 2
    assert "there are no choices" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_end_says_what_to_do_next(tmp_path, number):
    make_pairs(tmp_path, 25)
    session = make_session(tmp_path)
    while answer(session, "ada") is not None:
        pass
    session.store.close()
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "agents", "label", "--out", str(tmp_path), "--no-open", "--port", "0"]
    env = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as process, ending(process):
        assert process.stdout is not None
        assert re.search(r"25 pairs, 28 choices so far; the page: http://127\.0\.0\.1:\d+ ", process.stdout.readline())
        process.send_signal(number)
        rest, _ = process.communicate()
    assert process.returncode == 0
    file = tmp_path / "choices.jsonl"
    assert (
        rest.strip()
        == f"0 new choices, 28 in {file}; learn a reward from them with: dpok fit-reward {file} --out my_reward"
    )
    assert not (tmp_path / ".lock").exists()
