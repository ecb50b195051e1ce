"""``dpok train --dry-run``: settings, memory, passes and time, without a model and without a run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agents import list_algorithms
from agents.cli.dry_run import (
    count_forward_passes,
    count_update_passes,
    describe,
    estimate_memory,
    options_of,
    seconds_left,
)
from agents.cli.main import main
from agents.cli.recipe import format_recipe
from agents.cli.train import parse
from agents.common.algorithm import DenoisingAlgorithm
from agents.common.callbacks import format_seconds
from dpok_gym.models.architecture import find_architecture

#: Settings of Stable Diffusion 1.5 with which the memory is soon told: eight times smaller images.
SMALL = ["--env", "DPOK-SD15-v0", "--image-size", "64", "--device", "cpu"]


def _config(*words: str) -> Any:
    return parse(list(words)).config


@pytest.mark.slow
def test_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMALL, "--gradient-checkpointing", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())  # no run folder
    assert "learning-rate: 0.0001" in printed
    lines = [line for line in printed.splitlines() if line.startswith("#")]
    text = "\n".join(lines)
    for what in (
        "denoiser, bfloat16",
        "autoencoder",
        "text encoders",
        "down_blocks",
        "LoRA, 4 times",
        "trajectories of 64 images",
    ):
        assert what in text
    assert "reward image-reward" in text
    assert "update, 1 at a time, with gradient checkpointing" in text
    # 64 images in 20 steps, each guided; half of the steps are learned from, and the KL is to the pre-trained model.
    assert "2,560  rollout of 64 images in 20 steps" in text
    assert text.count("1,280  update") == 3
    assert "640 elements in 10 steps" in text
    assert "3,840  evaluation of 32 images" in text
    assert "time: dpok train says it once two iterations have run" in text
    # What was printed is a recipe of the same run.
    (tmp_path / "mine.yaml").write_text(printed)
    assert _config("--config", "mine.yaml") == _config(*SMALL, "--gradient-checkpointing")


@pytest.mark.parametrize("algo", list_algorithms())
@pytest.mark.parametrize("env", ["DPOK-Shapes-v0", "DPOK-SD15-v0"])
def test_every_config_can_be_written_as_a_recipe(tmp_path: Path, algo: str, env: str) -> None:
    config = _config("--env", env, "--algo", algo, "--image-size", "64", "128", "--target-modules", "to_q", "to_k")
    (tmp_path / "mine.yaml").write_text(format_recipe(options_of(config)))
    assert _config("--config", str(tmp_path / "mine.yaml")) == config


def test_unknown_models_are_said_to_be_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--env", "DPOK-SD15-v0", "--model", "someone/theirs", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "memory: not known: the files of the model 'someone/theirs' are not here" in printed
    assert "hf download someone/theirs --include '*.json'" in printed
    assert main(["train", "--env", "DPOK-Mixture-v0", "--dry-run"]) == 0
    assert "memory: not known: the model 'mixture' is made by a function" in capsys.readouterr().out


@pytest.mark.slow
def test_time_of_a_run_that_has_begun(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its log has two iterations of two images, all of them; with more images there is something left."""
    before = sorted(path.name for path in finished.iterdir())
    assert main(["train", "--resume", "--out", str(finished), "--images", "1000", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "more for the images that are left, at the latest speed in" in printed
    assert "reward shapes-alignment, shapes-quality" in printed  # whose memory is not known
    assert sorted(path.name for path in finished.iterdir()) == before


def test_seconds_left() -> None:
    slow = {"rollout/images": 64.0, "time/rollout_images_per_second": 0.5, "time/update_images_per_second": 0.5}
    fast = slow | {"rollout/images": 128.0, "time/rollout_images_per_second": 2.0}
    assert seconds_left([slow], 1000) is None
    assert seconds_left([slow, fast], 228) == 100 * (1 / 2 + 2)
    assert seconds_left([slow, fast], 100) == 0
    fit = {"rollout/images": 128.0, "time/update_images_per_second": 9.0}  # a row of a fit draws nothing
    drawn = {name: value for name, value in fast.items() if "update" not in name}
    assert seconds_left([drawn, drawn, fit], 130) == 1.0


def test_durations_are_readable() -> None:
    durations = {3: "3 seconds", 89: "89 seconds", 90: "2 minutes", 7200: "2.0 hours", 3 * 86400: "3.0 days"}
    assert {seconds: format_seconds(seconds) for seconds in durations} == durations


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # elements, forward, backward, without a gradient, steps
        (["--algo", "dpok"], (640, 1280, 1280, 1280, 10)),
        (["--algo", "dpok", "--kl-coef", "0", "--guidance-gradient", "conditional"], (576, 1152, 576, 0, 9)),
        (["--algo", "dpok", "--guidance-scale", "1", "--n-epochs", "2"], (1280, 1280, 1280, 1280, 20)),
        (["--algo", "dpok", "--sde-steps", "4", "6"], (192, 384, 384, 512, 3)),
        (["--algo", "dpok", "--kl-coef", "0", "--sde-steps", "16", "4"], (64, 128, 128, 0, 1)),
        (["--algo", "reinforce"], (144, 288, 288, 0, 1)),
        (["--algo", "diffusion-nft"], (384, 384, 384, 384, 4)),
        (["--algo", "awm"], (384, 384, 384, 768, 4)),
        (["--algo", "awm", "--num-inference-steps", "4"], (256, 256, 256, 512, 3)),
        (["--algo", "diffusion-dpo"], (320, 640, 640, 640, 10)),
        (["--algo", "diffusion-dpo", "--choices", "c.jsonl"], (64000, 128000, 128000, 128000, 2000)),
        (["--algo", "draft"], (64, 128, 128, 0, 4)),
        (["--algo", "sft"], (64000, 64000, 64000, 0, 2000)),
        (["--algo", "sft", "--regularization", "KL-O"], (64000, 64000, 64000, 64000, 2000)),
        (["--algo", "sft", "--anchor-coef", "0.1", "--anchor-images", "20"], (64000, 104000, 104000, 0, 2000)),
    ],
)
def test_passes_of_an_update(words: list[str], expected: tuple[int, ...]) -> None:
    passes = count_update_passes(_config("--env", "DPOK-SD15-v0", *words))
    assert passes is not None
    counted = (passes.elements, passes.forward, passes.backward, passes.without_gradient, passes.optimizer_steps)
    assert counted == expected
    assert passes.is_per_iteration == ("sft" not in words and "--choices" not in words)


@pytest.mark.parametrize(("words", "expected"), [([], 1), (["--model-kwargs", "true_cfg_scale=4"], 2)])
def test_guidance_that_is_an_input_costs_no_pass(words: list[str], expected: int) -> None:
    assert count_forward_passes(_config("--env", "DPOK-FLUX-v0", *words)) == expected


#: The family of a small model, further options, and the error.
REFUSED = [
    ("stable-diffusion", "--eta 2", "eta must lie in [0, 1], got 2.0"),
    ("stable-diffusion", "--num-inference-steps 0", "num_inference_steps must be an integer of at least 1, got 0"),
    ("stable-diffusion", "--num-inference-steps 1001", "num_inference_steps must be an integer of at most 1,000"),
    ("stable-diffusion", "--negative-prompt dark --guidance-scale 1", "a negative prompt has no effect with"),
    ("stable-diffusion", "--sampler ode", "no denoising step adds noise (sampler='ode', eta=0.0)"),
    ("stable-diffusion", "--dtype float16", "float16 can draw but not learn"),
    ("stable-diffusion", "--image-size 7", "image_size must be one or two (height, width) multiples of"),
    ("stable-diffusion", "--timestep-spacing leading --model-kwargs true_cfg_scale=2", "takes no true_cfg_scale"),
    ("stable-diffusion", "--model-kwargs true_cfg=2", "unknown argument of load_model 'true_cfg'"),
    ("stable-diffusion", "--algo grpo --group-size 7", "cannot be split into groups of 7"),
    ("stable-diffusion", "--algo draft --n-last-steps 21", "n_last_steps must be from 1 to the 20 denoising steps"),
    ("stable-diffusion", "--kl-coef -1", "kl_coef must be a number of at least 0, got -1.0"),
    ("pixart-sigma", "--sampler flow-sde", "the sampler 'flow-sde' is for flow-matching models, and the model"),
    ("flux-dev", "--sampler cps --eta 2", "eta must lie in [0, 1], got 2.0"),
    ("flux-dev", "--sde-steps 18 4", "sde_steps=(18, 4) ends after step 21, but the last of the 20 denoising steps is"),
    ("flux-dev", "--negative-prompt dark", "reads guidance_scale as a number, so a negative prompt has no effect"),
    ("flux-dev", "--timestep-spacing leading", "a flow-matching model has no timestep_spacing='leading'"),
    ("flux-schnell", "--guidance-scale 3.5", "is guidance-distilled and reads no guidance scale"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "words", "message"), REFUSED)
def test_what_a_run_refuses(
    family: str,
    words: str,
    message: str,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error is the run's own, and no weights are read for it."""
    options = ["train", "--env", "DPOK-SD15-v0", "--model", str(tiny_folder(family)), "--dtype", "float32"]
    options += ["--prompts", "a dog", "--reward", "jpeg-compressibility", "--device", "cpu", *words.split()]
    monkeypatch.setattr("agents.cli.run.Run.begin", None)  # what is not refused fails here, before it trains
    assert main([*options, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    with monkeypatch.context() as patch:
        patch.setattr("dpok_gym.models.loading._load_networks", None)
        assert main([*options, "--dry-run"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eta", "2"], r"eta must lie in \[0, 1\], got 2"),
        (["--sde-steps", "18", "4"], r"sde_steps=\(18, 4\) ends after step 21, but the last of the 20"),
    ],
)
def test_what_no_model_takes(words: list[str], message: str) -> None:
    """The networks of a model that a function makes are not known."""
    with pytest.raises(ValueError, match=message):
        describe(_config("--env", "DPOK-Mixture-v0", *words))


@pytest.mark.slow
def test_a_second_pass_takes_memory(tiny_folder: Callable[[str], Path]) -> None:
    architecture = find_architecture(str(tiny_folder("flux-dev")))
    words = ["--env", "DPOK-FLUX-v0", "--dtype", "float32", "--image-size", "64"]
    plain, guided = (
        estimate_memory(_config(*words, *more), architecture).phases
        for more in ([], ["--model-kwargs", "true_cfg_scale=4"])
    )
    (rollout,) = (what for what in plain if what.startswith("rollout"))
    assert guided[rollout] > 1.5 * plain[rollout]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "anchor"), [("dpok", 0), ("dpok", 8), ("ddpo", 0), ("diffusion-nft", 0), ("diffusion-nft", 40), ("awm", 0)]
)
def test_the_passes_are_those_of_a_run(algo: str, anchor: int, tiny_sd_folder: Path) -> None:
    """Counted by the process, whose denoiser's every call goes through one method."""
    config = _config(
        *("--env", "DPOK-SD15-v0", "--algo", algo, "--model", str(tiny_sd_folder), "--prompts", "a dog"),
        *("--reward", "jpeg-compressibility", "--num-inference-steps", "6", "--images-per-iteration", "16"),
        *("--device", "cpu", "--dtype", "float32"),
        *("--max-batch-size", "16", "--micro-batch-size", "16", "--gradient-checkpointing", "False"),
        *(["--anchor-coef", "0.1", "--anchor-images", str(anchor)] * bool(anchor)),
    )
    agent = config.make_agent(config.make_env(16))
    agent.learn(16 * 6)
    passes = count_update_passes(config)
    assert passes is not None
    rollout = (16 + anchor) * 6 * 2
    assert agent.process.num_function_evaluations == rollout + passes.forward + passes.without_gradient
    assert agent._n_updates == passes.optimizer_steps


class OfTheirOwn(DenoisingAlgorithm):
    def train(self) -> None: ...

    def loss(self, batch: Any) -> Any: ...


def test_an_algorithm_of_ones_own_base() -> None:
    config = _config("--env", "DPOK-Mixture-v0", "--algo", f"{__name__}:OfTheirOwn")
    assert count_update_passes(config) is None
    assert "update: not known for this algorithm" in describe(config)


@pytest.mark.slow
def test_memory_of_each_setting(tiny_sd_folder: Path) -> None:
    architecture = find_architecture(str(tiny_sd_folder))
    plain = ["--env", "DPOK-SD15-v0", "--dtype", "float32", "--gradient-checkpointing", "False"]

    def expected(*words: str, on_gpu: bool = True) -> int:
        return estimate_memory(_config(*plain, *words), architecture, on_gpu).counted

    usual = expected()
    assert expected("--dtype", "bfloat16", "--gradient-checkpointing") < usual
    assert expected("--micro-batch-size", "4") > usual
    # Without either limit, all elements of an iteration are one batch.
    reinforce = ["--algo", "reinforce", "--images-per-iteration", "2"]
    assert expected(*reinforce, "--micro-batch-size", "None") > expected(*reinforce)
    assert expected("--lora-rank", "0") > usual
    assert expected("--critic-kind", "network", "--reward", "jpeg-compressibility") < usual
    assert expected("--images-per-iteration", "128", on_gpu=False) > usual
    # With little memory free, "auto" computes parts again.
    auto = _config(*plain, "--gradient-checkpointing", "auto")
    for free, how in ((2**40, "without"), (2**20, "with"), (None, "with")):
        phases = estimate_memory(auto, architecture, free=free).phases
        assert f"update, 1 at a time, {how} gradient checkpointing" in phases


def test_what_is_kept(tiny_sd_folder: Path) -> None:
    architecture = find_architecture(str(tiny_sd_folder))
    words = ["--env", "DPOK-SD15-v0", "--dtype", "float32", "--gradient-checkpointing", "False"]
    of_nft = estimate_memory(_config(*words, "--algo", "diffusion-nft"), architecture, on_gpu=False)
    # A third copy of the 4 x 8 x 8 latents would be one too many: x_T to x_0, and the mean of each step.
    assert of_nft.kept["trajectories of 64 images"] == 64 * (21 + 20) * 256 * 4
    assert of_nft.kept["reward image-reward"] == 446_000_000 * 4
    assert "LoRA, 5 times: its gradient, AdamW and the old policy" in of_nft.kept
    assert any(what.startswith("text encoders, ") for what in of_nft.kept)
    # 40 tokens of 32 numbers.
    assert of_nft.kept["their prompts, encoded"] == 64 * 40 * 32 * 4
    of_rwr = estimate_memory(_config(*words, "--algo", "rwr", "--images", "100"), architecture)
    assert of_rwr.kept["100 latents to learn from"] == 100 * 256 * 4
    assert of_rwr.kept["reward image-reward"] == 446_000_000 * 2
    assert "LoRA, 4 times: its gradient, AdamW" in of_rwr.kept
    assert not any(what.startswith("text encoders, ") for what in of_rwr.kept)
    ((what, on_gpu),) = (phase for phase in of_rwr.phases.items() if phase[0].startswith("encoding a prompt"))
    assert what.startswith("encoding a prompt, with the text encoders, ")
    (encoders,) = (size for what, size in of_nft.kept.items() if what.startswith("text encoders, "))
    assert on_gpu == of_nft.phases["encoding a prompt"] + encoders
    assert of_rwr.expected > 1.1 * of_rwr.counted > of_nft.counted / 4
