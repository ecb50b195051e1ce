"""Wrong words for every option of every command: each is one line, the exit code 2, and nothing on the disk changes."""

import json
from dataclasses import fields
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from PIL import Image

from agents.algorithms.registry import list_algorithms
from agents.cli import fit_reward, train
from agents.cli.arguments import kinds_of_options
from agents.cli.config import default_config
from agents.cli.evaluate import Evaluate
from agents.cli.export import Export
from agents.cli.label import Label
from agents.cli.main import main
from agents.cli.sample import Sample
from agents.cli.serve_reward import ServeReward
from agents.common.steering import FKSteering
from tests.bad_input.support import WRONG_WORDS, check_message, contents, describe, kind_of

#: Words that are wrong for options that are texts.
TEXTS = {
    "--env": ["", "x", "DPOK-Shape-v0", "CartPole-v1", "no_such_module:Env-v0", ":", "a:b:c"],
    "--algo": ["", "x", "dpokk", "no_such_module:DPOK", "os:path", "os:"],
    "--preset": ["", "x", "laptopp"],
    "--device": ["", "x", "cuda:99", "gpu", "meta", "-1"],
    "--model": ["", " ", "no/such/model/here", "no_such_module:model", "os:path"],
    "--prompts": ["", " ", "a red dragon", "conut", "missing.txt", "a red circle " * 50],
    "--reward": ["", ",", "=1", "shapes-alignmen", "a,a", "shapes-alignment=x", "shapes-alignment=1e39", "os:path"],
    "--negative-prompt": ["a red dragon", "a red circle"],
    "--image-size": ["0", "-8", "7", "x", "1000000"],
    "--resume-from-checkpoint": ["latest", "checkpoint-3"],
    "--steering": ["x", "best"],
    "--decode-batch-size": ["0", "x", "-1", "1.5"],
    "--skip-last-steps": ["x", "-1", "1.5"],
    "--micro-batch-size": ["0", "x", "-1", "1.5"],
    "--max-batch-size": ["0", "x", "-1", "1.5"],
    "--target-modules": ["", "x", "attentoin"],
    "--eta": ["-1", "1.1"],
    "--num-inference-steps": ["0", "1001"],
    "--images": ["0", "1000000001"],
    "--images-from": ["nowhere"],
    "--repeats": ["1.1"],
    "--shared": ["1.1"],
    "--n-envs": ["0", "1000000"],
    "--eval-images": ["0", "10000000"],
    "--lora-rank": ["100000"],
    "--seed": ["4294967296"],
    "--held-out": ["0", "1"],
    "--epochs": ["0"],
    "--port": ["65536"],
    "--n": ["0", "10000000"],
    "--out": ["picture.jpg"],
}
#: Words that only some commands refuse.
_ONLY = {
    "--out": "sample",
    "--n": "sample",
    "--images": "train evaluate label",
    "--num-inference-steps": "train sample label",
}
#: Words that are read as the option's name in the message.
_SYNONYMS = {
    "--prompts": ["prompt"],
    "--negative-prompt": ["prompt"],
    "--device": ["device"],
    "--algo": ["algorithm"],
    "--env": ["environment"],
    "--resume-from-checkpoint": ["--resume", "run folder"],
    "--learning-rate": ["learning_rate"],
    "--target-modules": ["layer"],
    "--optimizer-kwargs": ["NAME=VALUE"],
}

BASE = {
    "sample": ["sample", "--prompt", "a red circle", "--n", "1", "--num-inference-steps", "2", "--device", "cpu"],
    "evaluate": ["evaluate", "{run}", "--images", "1", "--device", "cpu"],
    "export": ["export", "{run}", "--format", "merged", "--out", "{here}/out", "--device", "cpu"],
    "fit-reward": ["fit-reward", "{choices}", "--out", "{here}/out", "--device", "cpu"],
    "serve-reward": ["serve-reward", "jpeg-compressibility"],
    "label": [
        "label",
        "--prompts",
        "a red circle",
        "--out",
        "{here}/out",
        "--num-inference-steps",
        "2",
        "--device",
        "cpu",
    ],
    "train": ["train", "--out", "{here}/out", "--num-inference-steps", "2", "--device", "cpu"],
}
OPTIONS = {
    "sample": Sample,
    "evaluate": Evaluate,
    "export": Export,
    "fit-reward": fit_reward.FitReward,
    "serve-reward": ServeReward,
    "label": Label,
}


def _annotations(options):
    """Returns the types of a dataclass's options by name, those of nested ones included."""
    known = set(kinds_of_options(options))
    found = {}
    for name, annotation in get_type_hints(options, include_extras=True).items():
        kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
        if f"--{name.replace('_', '-')}" in known:
            found[f"--{name.replace('_', '-')}"] = kind
        elif hasattr(kind, "__dataclass_fields__"):
            found |= _annotations(kind)
    return found


def _cases():
    cases: list[tuple[str, list[str], str, str]] = []
    for command, options in OPTIONS.items():
        for name, kind in _annotations(options).items():
            words = list(WRONG_WORDS.get(kind_of(kind), []))
            words += TEXTS.get(name, []) if command in _ONLY.get(name, command).split() else []
            cases += [(command, [], name, word) for word in dict.fromkeys(words)]
    known: set[str] = set()
    for algorithm in ["dpok", *list_algorithms()]:
        own = _annotations(train.options_class(default_config("DPOK-Shapes-v0", algorithm)))
        for name, kind in own.items():
            if name in known:
                continue
            # The constructors, which refuse the other wrong values, have tests of their own.
            words = WRONG_WORDS.get(kind_of(kind), [])[-2:]
            if name in TEXTS and "train" in _ONLY.get(name, "train").split():
                words = [*words, *TEXTS[name]]
            cases += [("train", ["--algo", algorithm], name, word) for word in dict.fromkeys(words)]
        known |= own.keys()
    return [pytest.param(*case, id=f"{case[0]}{case[2]}={describe(case[3])}") for case in cases]


@pytest.fixture(autouse=True)
def _nothing_is_done(monkeypatch):
    """A command that accepts its words ends at once, with an error of the test."""

    def accepted(*args, **kwargs):
        raise AssertionError("the words were accepted")

    monkeypatch.setattr("agents.cli.run.Run.begin", accepted)
    monkeypatch.setattr("agents.common.evaluation._sample_chunk", accepted)
    monkeypatch.setattr("dpok_gym.rewards.preference.fit._fit_epoch", accepted)
    monkeypatch.setattr("uvicorn.Server.run", accepted)


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    """A file of choices between images of one colour."""
    folder = tmp_path_factory.mktemp("choices")
    rows = []
    for k in range(24):
        for side in "ab":
            Image.new("RGB", (16, 16), (10 * k, 0, 0)).save(folder / f"{k}{side}.png")
        rows.append({"prompt": "a red star", "images": [f"{k}a.png", f"{k}b.png"], "preferred": k % 2})
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "choices.jsonl"


def _refuse(words, capsys, folder, *names):
    """Asserts that a command line is refused as it must be."""
    before = contents(folder)
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.err.startswith("dpok: error: "), output.err
    assert output.err.count("\n") == 1, output.err
    check_message(output.err.removeprefix("dpok: error: "), *names)
    assert contents(folder) == before


@pytest.mark.parametrize(("command", "further", "name", "word"), _cases())
def test_options(shapes_run, choices, tmp_path, monkeypatch, capsys, command, further, name, word):
    monkeypatch.chdir(tmp_path)
    base = [part.format(run=shapes_run, choices=choices, here=tmp_path) for part in BASE[command]]
    if command == "sample" and name == "--reward":
        further = ["--steering", "best-of"]
    if name in {f"--{field.name.replace('_', '-')}" for field in fields(FKSteering)} and command != "train":
        further = ["--steering", "fk"]
    _refuse([*base, *further, f"{name}={word}"], capsys, tmp_path, name, *_SYNONYMS.get(name, []))


@pytest.mark.parametrize("out", ["folder.png", "file/picture.png"])
def test_pictures_that_cannot_be_written(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    _refuse([*BASE["sample"], "--out", out], capsys, tmp_path, out)


def _misspelt():
    for command, options in {
        **OPTIONS,
        "train": train.options_class(default_config("DPOK-Shapes-v0", "dpok")),
    }.items():
        names = [name for name in kinds_of_options(options) if len(name) > 5]
        for name in (names[0], names[-1]):  # one of the command's own, and one of those that it shares
            yield pytest.param(command, f"{name[:3]}{name[4:]}", name, id=f"{command}{name}")


@pytest.mark.parametrize(("command", "written", "name"), list(_misspelt()))
def test_misspelt_options(shapes_run, choices, tmp_path, monkeypatch, capsys, command, written, name):
    monkeypatch.chdir(tmp_path)
    base = [part.format(run=shapes_run, choices=choices, here=tmp_path) for part in BASE[command]]
    _refuse([*base, f"{written}=1"], capsys, tmp_path, f"did you mean '{name}'")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([""], "command"),
        (["trian"], "did you mean 'train'"),
        (["evaluate"], "FOLDER"),
        (["evaluate", ""], "FOLDER"),
        (["evaluate", "nowhere"], "nowhere"),
        (["evaluate", "."], "no run folder"),
        (["export"], "FOLDER"),
        (["export", "nowhere"], "nowhere"),
        (["fit-reward", "nowhere.jsonl", "--out", "out"], "nowhere.jsonl"),
        (["fit-reward", ".", "--out", "out"], "file of choices"),
        (["fit-reward", "--out", "out"], "FILE"),
        (["label"], "--prompts"),
        (["label", "--images", "7", "--prompts", "a star"], "--images"),
        (["label", "--run", "nowhere"], "nowhere"),
        (["label", "--images-from", "."], "prompts.csv"),
        (["label", "--report"], "choices"),
        (["serve-reward"], "REWARD"),
        (["serve-reward", ""], "reward"),
        (["serve-reward", "beauty"], "beauty"),
        (["serve-reward", "jpeg-compressibility=nan"], "weight"),
        (["sample"], "--prompt"),
        (["sample", "--prompt", ""], "--prompt"),
        (["sample", "--prompt", " "], "--prompt"),
        (["sample", "--prompt", "a red dragon"], "dragon"),
        (["sample", "three", "squares"], "prompt"),
        (["sample", "--prompt", "a star", "--lora", "nowhere"], "nowhere"),
        (["sample", "--prompt", "a star", "--reward", "jpeg-compressibility"], "--steering"),
        (["sample", "--prompt", "a star", "--n-particles", "3"], "--steering"),
        (["sample", "--prompt", "a star", "--steering", "best-of", "--choice", "best"], "--choice"),
        (["train", "--resume"], "--out"),
        (["train", "--resume", "--out", "nowhere"], "nowhere"),
        (["train", "--resume-from-checkpoint", "latest"], "--out"),
        (["train", "a red star"], "a red star"),
        (["train", "--prompts", "a", "red", "star"], "red"),
        (["train", "--algo", "draft", "--reward", "jpeg-compressibility"], "gradient"),
        (["train", "--env", "DPOK-Mixture-v0", "--guidance-scale", "2"], "guidance"),
        (["train", "--dtype", "float16"], "float16"),
        (["train", "--lora", "nowhere"], "nowhere"),
        (["train", "--lora", "."], "LoRA"),
        (["train", "--dtype", "bfloat16", "--lora-rank", "0"], "bfloat16"),
        (["train", "--model-kwargs", "varient=fp16"], "variant"),
        (["train", "--optimizer-kwargs", "wieght_decay=1"], "wieght_decay"),
        (["train", "--critic-kwargs", "{a: [}"], "critic"),
    ],
    ids=lambda value: "_".join(value)[:60] if isinstance(value, list) else "",
)  # fmt: skip
def test_command_lines(tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    _refuse(words, capsys, tmp_path, part)
