"""``dpok export``: every format draws the images of the run in other programs, and comes with a card."""

import json
import shutil

import pytest
import torch
import yaml
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from agents import load_run
from agents.cli.main import main
from dpok_gym.models.lora_files import FILE_NAME
from tests.agents.cli.support import FEW_LAYERS, TINY, train

PROMPT = "a green rabbit."
#: A large learning rate, so that the LoRA changes something.
OPTIONS = [
    "--images",
    "2",
    "--learning-rate",
    "0.3",
    *TINY,
    "--guidance-scale",
    "3",
    "--reward",
    "jpeg-compressibility",
    "--dtype",
    "float32",
]


@pytest.fixture(scope="module")
def run(tiny_sd_folder, tmp_path_factory):
    """A finished run of a tiny Stable Diffusion, with convolutions. It is read, not changed."""
    folder = tmp_path_factory.mktemp("runs") / "rabbit"
    words = ["--env", "DPOK-SD15-v0", "--model", str(tiny_sd_folder), "--prompts", PROMPT, "--target-modules", "all"]
    assert train(folder, *words, *OPTIONS) == 0
    return folder


def draw(pipeline):
    """Draws an image as the agent did in training."""
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "eta": 1.0, "guidance_scale": 3.0, "output_type": "pt"}
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **settings).images[0]


def draw_as_the_card_says(folder, base):
    """Runs the code of a card, with the places that a reader fills in."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace(repr(base.name), repr(str(base))).replace(repr(f"path/to/{folder.name}"), repr(str(folder)))
    code = code.replace(").images", ", generator=torch.Generator().manual_seed(0), output_type='pt').images")
    names = {"torch": torch}
    exec(code, names)
    return names["image"]


def export(run, out, kind, *options):
    return main(["export", str(run), "--format", kind, "--out", str(out), "--device", "cpu", *options])


def front_matter(folder):
    _, header, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header)


@pytest.mark.slow
def test_a_run_in_half_precision_is_merged_in_full_precision(tiny_sd_folder, tmp_path):
    words = ["--env", "DPOK-SD15-v0", "--model", str(tiny_sd_folder), "--prompts", PROMPT]
    assert train(tmp_path / "run", *words, *OPTIONS, "--dtype", "bfloat16") == 0
    for kind in ("merged", "diffusers"):
        assert export(tmp_path / "run", tmp_path / kind, kind) == 0
    expected = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    expected.load_lora_weights(str(tmp_path / "diffusers"))
    expected.fuse_lora()
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    weights = merged.unet.state_dict()
    for name, values in expected.unet.state_dict().items():
        if "lora" not in name:
            torch.testing.assert_close(weights[name.replace(".base_layer", "")], values)


@pytest.mark.slow
def test_every_format_draws_the_same_images(run, tiny_sd_folder, tmp_path, capsys):
    agent = load_run(run, "cpu")
    expected = draw(agent.pipeline())
    assert not torch.allclose(draw(agent.process.model.to_pipeline()), expected, atol=1e-2)
    for kind in ("diffusers", "kohya", "peft", "merged"):
        out = tmp_path / f"rabbit-{kind}"
        assert export(run, out, kind) == 0
        assert f"wrote {out}; {out / 'README.md'} says how to use it" in capsys.readouterr().out
        images = draw_as_the_card_says(out, tiny_sd_folder)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
        card = (out / "README.md").read_text()
        assert "![before after](before_after.png)" in card
        assert (out / "before_after.png").read_bytes() == (run / "before_after.png").read_bytes()
        assert "the scheduler DDIM (eta 1.0, spacing leading), 2 steps, guidance scale 3.0" in card
        assert ("ComfyUI" in card) == (kind == "kohya")
        assert ("lora" in front_matter(out)["tags"]) == (kind != "merged")
        assert front_matter(out)["instance_prompt"] == PROMPT
        # A published card names no folder of the machine that trained.
        assert str(tiny_sd_folder.parent) not in card
    with safe_open(tmp_path / "rabbit-kohya" / "rabbit-kohya.safetensors", "pt") as file:
        notes = file.metadata()
    assert notes["ss_base_model_version"] == "sd_v1"
    assert notes["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (notes["ss_network_dim"], notes["ss_network_alpha"]) == ("2", "2.0")
    assert notes["ss_sd_model_name"] == tiny_sd_folder.name
    assert (
        notes["modelspec.usage_hint"]
        == "the scheduler DDIM (eta 1.0, spacing leading), 2 steps, guidance scale 3.0, strength 1"
    )
    with safe_open(tmp_path / "rabbit-diffusers" / FILE_NAME, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 2


@pytest.mark.slow
def test_a_transformer(tiny_folder, tmp_path, capsys, fresh_models):
    model = str(tiny_folder("stable-diffusion-3"))
    words = ["--env", "DPOK-SD15-v0", "--model", model, "--prompts", PROMPT, "--eta", "1"]
    assert train(tmp_path / "run", *words, *OPTIONS) == 0
    latents = torch.randn(1, 4, 8, 8)
    settings = {"latents": latents, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    expected = load_run(tmp_path / "run", "cpu").pipeline()(PROMPT, **settings).images
    plain = StableDiffusion3Pipeline.from_pretrained(model)
    assert not torch.allclose(plain(PROMPT, **settings).images, expected, atol=1e-2)
    for kind in ("diffusers", "peft", "merged"):
        assert export(tmp_path / "run", tmp_path / kind, kind) == 0
        pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / kind if kind == "merged" else model)
        if kind == "diffusers":
            pipeline.load_lora_weights(str(tmp_path / kind))
        elif kind == "peft":
            pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, tmp_path / kind)
        torch.testing.assert_close(pipeline(PROMPT, **settings).images, expected, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert export(tmp_path / "run", tmp_path / "kohya", "kohya") == 2
    assert "use --format diffusers, whose file pytorch_lora_weights.safetensors ComfyUI" in capsys.readouterr().err


def test_lora_formats_load_no_model(run, tmp_path, monkeypatch):
    """So they work where the model is not, and where its memory is not."""
    monkeypatch.setattr("dpok_gym.vector_env.find_model", None)
    assert export(run, tmp_path / "out", "kohya", "--no-figures") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"out.safetensors", "README.md"}
    assert "![" not in (tmp_path / "out" / "README.md").read_text()


def test_default_folder_and_what_is_there_already(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    assert main(["export", str(run)]) == 0
    assert {path.name for path in (run / "export-diffusers").glob("*.safetensors")} == {FILE_NAME}
    assert main(["export", str(run)]) == 2
    assert "export-diffusers is there already; choose another folder with --out" in capsys.readouterr().err
    # The run goes on as before.
    assert train(run, "--resume", "--images", "6") == 0


def test_an_interrupted_run(finished, tmp_path):
    """It has no evaluation, so the card has neither scores nor figures."""
    run = shutil.copytree(finished, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"interrupted": True}))
    shutil.rmtree(run / "lora")
    assert export(run, tmp_path / "out", "diffusers") == 0
    assert (tmp_path / "out" / FILE_NAME).read_bytes() == (finished / "lora" / FILE_NAME).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Results" not in card
    assert "![" not in card
    assert "images drawn in training: 4" in card


def test_without_checkpoints(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    assert export(run, tmp_path / "out", "peft") == 0
    assert "images drawn in training: 4" in (tmp_path / "out" / "README.md").read_text()
    shutil.rmtree(run / "lora")
    assert export(run, tmp_path / "again", "peft") == 2
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_a_whole_denoiser_is_no_lora(tiny_sd_folder, tmp_path, capsys, fresh_models):
    words = ["--env", "DPOK-SD15-v0", "--model", str(tiny_sd_folder), "--prompts", PROMPT]
    run = tmp_path / "run"
    assert train(run, *words, *OPTIONS, "--lora-rank", "0", "--learning-rate", "0.01") == 0
    assert export(run, tmp_path / "out", "kohya") == 2
    assert (
        "trained the whole denoiser (--lora-rank 0), which is no LoRA: use --format merged" in capsys.readouterr().err
    )
    assert export(run, tmp_path / "out", "merged") == 0
    pipeline = draw_as_the_card_says(tmp_path / "out", tiny_sd_folder)
    torch.testing.assert_close(pipeline, draw(load_run(run, "cpu").pipeline()), rtol=1e-4, atol=1e-4)
    assert "- a whole pipeline, with what was learned in its weights" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_model_with_another_scheduler(tiny_sd_folder, tmp_path, fresh_models):
    """The card names the spacing of the steps, which the model's own scheduler has otherwise."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    euler = {"timestep_spacing": "linspace", "steps_offset": 0}
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config, **euler)
    pipe.save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    words = ["--env", "DPOK-SD15-v0", "--model", str(tmp_path / "model"), "--prompts", PROMPT]
    assert train(run, *words, *OPTIONS) == 0
    expected = draw(load_run(run, "cpu").pipeline())
    for kind in ("kohya", "merged"):
        assert export(run, tmp_path / kind, kind) == 0
        images = draw_as_the_card_says(tmp_path / kind, tmp_path / "model")
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
        assert "spacing trailing" in (tmp_path / kind / "README.md").read_text()


@pytest.mark.slow
def test_a_world_without_a_pipeline(tmp_path, capsys):
    words = ["--env", "DPOK-Mixture-v0", "--images", "2", "--n-envs", "2", "--images-per-iteration", "2"]
    assert train(tmp_path / "run", *words, "--eval-images", "2", "--num-inference-steps", "2", "--device", "cpu") == 0
    assert export(tmp_path / "run", tmp_path / "out", "merged") == 2
    assert "diffusers has no pipeline for the model 'mixture'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is no run folder: it has no config.yaml"),
        (["RUN", "--format", "comfyui"], "--format cannot be 'comfyui'"),
        (["RUN", "--model", "x"], "--model is for --format merged; a LoRA is written without the model"),
        (["RUN", "--format", "merged", "--model", "nowhere"], "there is no folder nowhere; --model is the folder"),
        (["RUN", "--out", "FILE"], "is there already; choose another folder with --out"),
    ],
)
def test_wrong_options(finished, tmp_path, capsys, words, message):
    (tmp_path / "file").touch()
    places = {"RUN": str(finished), "FILE": str(tmp_path / "file")}
    assert main(["export", *(places.get(word, word) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_lora(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "checkpoint-4" / FILE_NAME
    whole = path.read_bytes()
    save_file(load_file(path), tmp_path / "without notes")
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    state = load_file(path)
    save_file(dict(list(state.items())[1:]), tmp_path / "a tensor less", notes)
    others = [(tmp_path / name).read_bytes() for name in ("without notes", "a tensor less")]
    for content in (b"", whole[: len(whole) // 2], *others):
        path.write_bytes(content)
        assert export(run, tmp_path / "out", "diffusers") == 2
        assert f"the LoRA file {path} is damaged" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_training_starts_from_a_lora(run, tiny_sd_folder, tmp_path, monkeypatch, capsys, fresh_models):
    """Of any format; and a resumed run does not need its file again."""
    monkeypatch.chdir(tmp_path)
    assert export(run, "first", "kohya") == 0
    before = load_run(run, "cpu").policy.lora.state_dict()
    words = ["--env", "DPOK-SD15-v0", "--model", str(tiny_sd_folder), "--prompts", PROMPT, *OPTIONS]
    words += ["--learning-rate", "0", *FEW_LAYERS, "--lora-rank", "5"]
    assert train("second", *words, "--lora", "first") == 0
    shutil.rmtree("first")
    fresh_models()
    after = load_run("second", "cpu").policy.lora.state_dict()
    assert set(after) == set(before)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)
    # The reference is the pre-trained model, not the LoRA that the run began with.
    assert json.loads((tmp_path / "second" / "summary.json").read_text())["kl_to_pretrained"] > 0.1
    assert train("second", "--resume", "--images", "4") == 0
    assert train("second", "--resume", "--images", "4", "--lora", "first") == 2
    assert "leave out --lora" in capsys.readouterr().err
    assert train("third", *words, "--lora", "first") == 2
    assert "there is no LoRA at first" in capsys.readouterr().err
    assert train("third", *words, "--lora", str(run)) == 0  # the folder of a run
    assert export("third", "again", "diffusers") == 0
    assert str(tmp_path) not in (tmp_path / "again" / "README.md").read_text()
