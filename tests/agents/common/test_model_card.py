"""Model cards: the header that the hub reads, the code that a reader copies, and what must not be published."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from agents.common.model_card import (
    Training,
    hub_id,
    lora_notes,
    noted_sampling,
    public_name,
    sampling_of,
    usage_hint,
    write_card,
)
from dpok_gym.models.lora import LoRA
from dpok_gym.models.lora_files import Ranks, write_peft
from tests.support import make_process

SAMPLING: dict[str, Any] = {
    "sampler": "ddim",
    "num_inference_steps": 20,
    "eta": 1.0,
    "sde_steps": None,
    "guidance_scale": 5.0,
    "true_cfg_scale": None,
    "negative_prompt": None,
    "image_size": None,
    "timestep_spacing": "leading",
    "is_flow_matching": False,
    "denoiser": "unet",
    "loads_lora_files": True,
    "pipeline_options": {},
}
RANKS = Ranks(4, {}, ("a", "b"))


def training(**changes: Any) -> Training:
    known: dict[str, Any] = {
        "model": "sd15",
        "algorithm": "DPOK",
        "prompts": "a green rabbit",
        "is_one_prompt": True,
        "rewards": {"jpeg-compressibility": 1.0},
        "sampling": SAMPLING,
        "settings": {"learning_rate": 1e-4},
        "seed": 0,
        "images": 1280,
    }
    return Training(**(known | changes))


def test_header_names_the_base_model(tmp_path: Path) -> None:
    card = write_card(tmp_path, training(), "diffusers", RANKS).read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert header["base_model_relation"] == "adapter"
    assert header["instance_prompt"] == "a green rabbit"
    assert "license" not in header  # the author's choice
    assert "- a LoRA of 2 layers with rank 4" in card
    assert "images drawn in training: 1,280" in card


def test_code_of_the_card_draws_as_trained(tmp_path: Path) -> None:
    sampling = SAMPLING | {"negative_prompt": "blurred", "image_size": [512, 768]}
    card = write_card(tmp_path, training(sampling=sampling), "kohya", RANKS, "me/rabbits").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    call = "prompt='a green rabbit', num_inference_steps=20, eta=1.0, guidance_scale=5.0, negative_prompt='blurred', "
    assert call + "height=512, width=768" in code
    assert "pipe.load_lora_weights('me/rabbits')" in code
    assert "ComfyUI" in card


def test_prompts_of_a_set_are_not_in_the_card(tmp_path: Path) -> None:
    card = write_card(tmp_path, training(prompts="mine.txt", is_one_prompt=False), "peft", RANKS).read_text()
    assert "instance_prompt" not in card
    assert "trained on the prompts `mine.txt`" in card
    assert "prompt='...'" in card


def test_nothing_of_the_machine_is_published(tmp_path: Path) -> None:
    private = training(
        model=str(tmp_path / "secret" / "model"),
        rewards={"http://10.0.0.7:8000": 1.0, str(tmp_path / "secret" / "reward"): 0.5, "redness": None},
        settings={"lora": str(tmp_path / "secret" / "first.safetensors"), "schedule": print, "n": [1, 2], "on": True}
        | {"held_out_reward": {"http://10.0.0.7:9000": 1.0, str(tmp_path / "secret" / "second"): 2.0}},
    )
    card = write_card(tmp_path, private, "merged").read_text()
    assert not any(text in card for text in ("secret", "10.0.0.7", str(tmp_path), "built-in"))
    assert "`a reward server` (weight 1.0), `reward` (weight 0.5), `redness`" in card
    assert "| `lora` | `first.safetensors` |" in card
    assert "| `n` | `[1, 2]` |" in card
    assert '| `held_out_reward` | `{"a reward server": 1.0, "second": 2.0}` |' in card
    assert "`schedule`" not in card


def test_scores_and_figures(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "card").mkdir()
    (tmp_path / "run" / "curve.png").write_bytes(b"a picture")
    scores: dict[str, Any] = {"eval_images": 8, "reward_before": 1.0, "reward_after": 2.0, "kl_to_pretrained": 3.0}
    scores |= {"aligned_before": None, "rewards_before": {"x": 0.5, "gone": 1.0}}
    scores |= {"rewards_after": {"x": 0.75, "new": 0.25}}  # as after a resumption where CLIP is there, or is not
    figures = [tmp_path / "run" / "curve.png"]
    card = write_card(tmp_path / "card", training(scores=scores, figures=figures), "merged").read_text()
    assert "| `x` | 0.500 | 0.750 |\n| `new` |  | 0.250 |" in card
    assert "gone" not in card
    assert "aligned" not in card
    assert (tmp_path / "card" / "curve.png").read_bytes() == b"a picture"
    interrupted = scores | {"reward_after": None}
    assert "Results" not in write_card(tmp_path / "card", training(scores=interrupted), "merged").read_text()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("somebody/model", "somebody/model"),
        ("shapes", None),
        ("my_module:model", None),
        ("/a/folder", None),
        ("~/folder/model", None),
        ("./folder/model", None),
    ],
)
def test_hub_ids(model: str, expected: str | None) -> None:
    assert hub_id(model) == expected


def test_public_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").mkdir()
    assert public_name("models/mine") == "mine"
    assert public_name("somebody/model") == "somebody/model"
    assert public_name("https://host/reward") == "a reward server"


FAMILIES = {
    "tiny_sd_folder": ("stable-diffusion-v1/lora", "sd_v1", "False", "epsilon"),
    "tiny_v_folder": ("stable-diffusion-v1/lora", "sd_v1", "False", "v"),
    "tiny_xl_folder": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "False", "epsilon"),
}


def test_a_velocity_of_flow_matching_has_no_word_in_the_notes(tiny_folder: Callable[[str], Path]) -> None:
    """ "v" would be that of a variance-preserving diffusion."""
    notes = lora_notes(make_process(tiny_folder("stable-diffusion-3"), 3))
    assert "modelspec.prediction_type" not in notes
    assert notes["modelspec.resolution"] == "16x16"


@pytest.mark.parametrize("note", ["[]", "{}", '{"eta": 1.0}'])
def test_notes_that_do_not_say_how_to_draw(note: str) -> None:
    with pytest.raises(ValueError, match=r"does not say sampler, .* write it again"):
        noted_sampling({"dpok_gym.sampling": note})


@pytest.mark.parametrize("folder", FAMILIES)
def test_notes_of_a_file(folder: str, request: pytest.FixtureRequest) -> None:
    process = make_process(request.getfixturevalue(folder), 3, guidance_scale=2.5)
    notes = lora_notes(process)
    names = ("modelspec.architecture", "ss_base_model_version", "ss_v2", "modelspec.prediction_type")
    assert tuple(notes[name] for name in names) == FAMILIES[folder]
    assert noted_sampling(notes) == SAMPLING | {"num_inference_steps": 3, "guidance_scale": 2.5}
    assert notes["modelspec.resolution"] == "16x16"
    assert notes["ss_sd_model_name"] == process.model.name.rpartition("/")[2]
    assert notes["modelspec.usage_hint"] == usage_hint(SAMPLING | {"num_inference_steps": 3, "guidance_scale": 2.5}) + (
        ", strength 1"
    )


def test_notes_of_stable_diffusion_2_and_of_another_denoiser(tiny_v_folder: Path) -> None:
    process = make_process(tiny_v_folder, 3)
    model: Any = process.model
    wide = SimpleNamespace(**vars(model), lora_prefix="unet.", loads_lora_files=True, pipeline_options={})
    wide.denoiser = SimpleNamespace(config={"cross_attention_dim": 1024})
    stand_in: Any = SimpleNamespace(model=wide, config=process.config)
    assert lora_notes(stand_in)["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert lora_notes(stand_in)["ss_v2"] == "True"
    wide.denoiser = torch.nn.Linear(1, 1)
    assert "modelspec.architecture" not in lora_notes(stand_in)


def test_hint_at_a_window_of_stochastic_steps() -> None:
    hint = usage_hint(SAMPLING | {"sde_steps": [4, 6]})
    assert hint == "the scheduler DDIM (eta 1.0 in steps 4 to 9 and 0 in the others, spacing leading), 20 steps, " + (
        "guidance scale 5.0"
    )


#: A format of each small pipeline that is no UNet.
TRANSFORMERS: dict[str, Any] = {
    "stable-diffusion-3": "diffusers",
    "flux-dev": "diffusers",
    "sana": "diffusers",
    "pixart-sigma": "peft",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_the_code_of_a_transformers_card_runs(
    family: str, tiny_folder: Callable[[str], Path], tmp_path: Path, fresh_models: Callable[[], None]
) -> None:
    kind = TRANSFORMERS[family]
    folder = tiny_folder(family)
    process = make_process(folder, 2, guidance_scale=3.0, image_size=32)
    lora = LoRA(process.model.denoiser, 2, process.model.lora_layers["attention"])
    if kind == "peft":
        write_peft(lora.state_dict(), tmp_path, None, {})
    else:
        lora.save(tmp_path, process.model.lora_prefix, lora_notes(process))
    trained = training(model=str(folder), sampling=sampling_of(process))
    card = write_card(tmp_path, trained, kind, RANKS, str(tmp_path)).read_text()
    assert ("DDIM" in card) == (family == "pixart-sigma")
    code = card.split("```python\n")[1].split("```")[0].replace(repr(folder.name), repr(str(folder)))
    assert ("eta=" in code) == (family == "pixart-sigma")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["image"].size == (32, 32)
    assert any("lora" in name for name, _ in names["pipe"].transformer.named_parameters())


def test_a_lora_file_for_a_pipeline_that_reads_none(tmp_path: Path) -> None:
    card = write_card(tmp_path, training(sampling=SAMPLING | {"loads_lora_files": False}), "diffusers").read_text()
    assert "reads no LoRA files. `dpok export RUN --format peft` writes" in card
    assert "```" not in card  # code without the LoRA would draw what was there before


def test_scale_of_true_guidance_is_in_the_call(tmp_path: Path) -> None:
    sampling = SAMPLING | {"true_cfg_scale": 2.0, "is_flow_matching": True, "sampler": "cps", "sde_steps": [1, 3]}
    card = write_card(tmp_path, training(sampling=sampling), "merged").read_text()
    assert "num_inference_steps=20, guidance_scale=5.0, true_cfg_scale=2.0)" in card
    assert "the sampler “cps” for flow matching (eta 1.0 in steps 1 to 3 and 0 in the others), 20 steps" in card
    assert "guidance scale 5.0, true CFG scale 2.0. " in card


def test_noise_levels_that_were_asked_for_are_in_the_call(tmp_path: Path) -> None:
    sampling = SAMPLING | {"is_flow_matching": True, "timestep_spacing": "trailing", "num_inference_steps": 4}
    card = write_card(tmp_path, training(sampling=sampling), "merged").read_text()
    assert "sigmas=[1.0, 0.75, 0.5, 0.25])" in card
