"""The measurements on a GPU, and of a denoiser alone, at a small size on the processor."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from rich.console import Console

from agents.common.memory import LIBRARIES, with_margin
from benchmarks import denoiser, gpu, gpu_recipes, throughput
from benchmarks.random_model import make_sd3_transformer, save_random
from benchmarks.ranks import Cluster
from benchmarks.runs import HERE
from dpok_gym.models import load_model
from dpok_gym.models.architecture import PUBLISHED, Architecture, find_architecture

RESULTS = HERE / "results"


def small_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        caption_projection_dim=32,
        joint_attention_dim=24,
        pooled_projection_dim=20,
    )


SMALL = denoiser.Denoiser(
    small_transformer,
    {"hidden_states": (16, 8, 8), "encoder_hidden_states": (5, 24), "pooled_projections": (20,)},
)


def test_a_denoiser_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(denoiser.DENOISERS, "sd3-medium", SMALL)
    out = tmp_path / "out.json"
    words = ["--model", "sd3-medium", "--batch-sizes", "1", "2", "--passes", "1", "--dtype", "float32"]
    denoiser.main([*words, "--out", str(out)])
    results = json.loads(out.read_text())
    assert [row["batch_size"] for row in results["rows"]] == [1, 2]
    assert all(row[name] > 0 for row in results["rows"] for name in ("samples_per_second", "flops", "gib"))
    assert results["update_seconds"] > 0
    assert "LoRA" in capsys.readouterr().out


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        network = make_sd3_transformer()
    assert 2.0e9 < sum(values.numel() for values in network.parameters()) < 2.1e9
    for each in denoiser.DENOISERS.values():
        with torch.device("meta"):
            network, inputs = each.make(), denoiser.make_inputs(each, 2, torch.device("meta"), torch.float32)
            first = next(iter(each.inputs))
            assert network(**inputs).sample.shape == inputs[first].shape


def test_the_plan_names_every_command_and_target(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--plan"])
    printed = capsys.readouterr().out
    for words in gpu.COMMANDS.values():
        assert " ".join(words) in printed
        # Every option is one that the command knows.
        module = {"benchmarks.throughput": throughput, "benchmarks.denoiser": denoiser}[words[0]]
        assert module.parse(words[1:]).device == "cuda"
    for target in gpu.TARGETS:
        assert f"{target.what}: {target.describe()}" in printed
        assert target.command in gpu.COMMANDS


def test_figures_beside_their_targets() -> None:
    def row(images: int, speed: float) -> dict[str, Any]:
        shares = {throughput.OUTSIDE: 0.02}
        return {"images": images, "images_per_second": speed, "rollout_flops": 4.0, "shares": shares, "update_gib": 9.0}

    results = {
        "sd15": {"ceiling_flops": 10.0, "rows": [row(16, 2.0)]},
        "sd15 update": {"ceiling_flops": 10.0, "rows": [row(1, 2.0)]},
        "sd15 compiled": {"ceiling_flops": 10.0, "rows": [row(16, 3.0)]},
    }
    console = Console(width=200, record=True)
    console.print(gpu.compare(results))
    lines = console.export_text().splitlines()
    found = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert [(cells[2], cells[3]) for cells in found] == [
        ("9", "missed"),
        ("0.4", "missed"),
        ("0.02", "met"),
        ("1.5", "met"),
        ("not measured", ""),
    ]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_model_of_random_weights(
    name: str, tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = {"sd15": "stable-diffusion", "sdxl": "stable-diffusion-xl"}
    small = find_architecture(str(tiny_folder(families[name])))
    words = {"vocab_size": 64, "max_position_embeddings": 77}
    configs = {part: {**config, **(words if "text" in part else {})} for part, config in small.configs.items()}
    monkeypatch.setitem(PUBLISHED, name, Architecture(small.pipeline, configs))
    folder = save_random(name, tmp_path / name)
    model = load_model(str(folder), dtype="bfloat16")
    assert model.denoiser.config.block_out_channels == small.configs["unet"]["block_out_channels"]
    told = model.encode(["a green rabbit.", "a dog"])
    assert all(values.isfinite().all() for values in told.values())
    assert not torch.equal(*told["encoder_hidden_states"])
    written = (folder / "model_index.json").stat().st_mtime_ns
    assert save_random(name, folder) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == written


def test_recipes_need_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_recipes.main([])
    assert "python -m benchmarks.memory --recipes" in capsys.readouterr().err


def test_a_recipe_that_fails_and_results_that_are_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published = json.loads((RESULTS / "gpu_recipes.json").read_text())
    row, out = published["sd15-8gb.yaml"], tmp_path / "out.json"
    out.write_text(json.dumps({"sd15-80gb.yaml": row}))

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        name = command[command.index("--only") + 1]
        return subprocess.CompletedProcess(command, "xl" in name, f"drawing\n{json.dumps(row)}\n")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"failed.*: sdxl-12gb\.yaml$"):
        gpu_recipes.main(["--only", "sdxl-12gb.yaml", "sd15-8gb.yaml", "--out", str(out)])
    assert list(json.loads(out.read_text())) == ["sd15-8gb.yaml", "sd15-80gb.yaml"]
    printed = capsys.readouterr().out
    assert "sd15-80gb.yaml" in printed
    assert "NVIDIA" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_models")
def test_a_recipe_is_measured(tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the processor, with a tiny model and the numbers of a GPU that is not there."""
    shutil.copytree(tiny_sd_folder, tmp_path / "random-sd15")
    short = [*gpu_recipes._SHORT[: gpu_recipes._SHORT.index("--device")], "--device", "cpu", "--prompts", "a dog"]
    monkeypatch.setattr(gpu_recipes, "_SHORT", short)
    limits: list[float] = []
    memory = {"mem_get_info": (60 * 2**30, 80 * 2**30), "max_memory_allocated": 2**30, "max_memory_reserved": 2**31}
    memory |= {"memory_reserved": 19 * 2**30, "get_device_name": "none", "reset_peak_memory_stats": None}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    row = gpu_recipes.measure(gpu_recipes.RECIPES / "sd15-8gb.yaml", tmp_path)
    assert limits == [pytest.approx((8e9 - LIBRARIES) / (80 * 2**30))]
    assert (row["tensors"], row["reserved"], row["process"]) == (1, 2, 3)
    assert min(row["rollout"], row["update"]) > 0
    assert 0 < row["counted"] < 1


def test_recipes_on_a_gpu_as_published() -> None:
    """The page's table is that of the measurements, and they are near what is expected."""
    rows = json.loads((RESULTS / "gpu_recipes.json").read_text())
    page = (RESULTS.parent / "README.md").read_text()
    assert len(rows) == page.count("\n| `sd15-") + page.count("\n| `sdxl-") == 4
    for name, row in rows.items():
        expected, taken = with_margin(round(row["counted"] * 2**30), "cuda") / 1e9, row["process"] * 2**30 / 1e9
        speeds = f"{row['rollout']:.1f} | {row['update']:.2g}"
        assert f"| `{name}` | {expected:.1f} | {taken:.1f} | {speeds} |" in page
        assert 0.95 < taken / expected < 1.035
        assert taken < gpu_recipes.model_and_gigabytes(name)[1]
    outside = max(row["process"] - row["reserved"] for row in rows.values())
    assert f"{outside:.2f}" == "0.76"
    assert outside < LIBRARIES / 2**30 < outside + 0.05


def test_speed_on_a_gpu_as_published() -> None:
    page = " ".join((RESULTS.parent / "README.md").read_text().split())
    results = json.loads((RESULTS / "gpu.json").read_text())
    rows = results["sd15"]["rows"]
    assert [row["images"] for row in rows] == gpu.BATCH_SIZES
    for row in rows:
        parts = ("denoiser", "decoder", throughput.OUTSIDE)
        shares = [f"{100 * row['shares'][part]:.0f} %" for part in parts]
        rollout, update = f"{row['images_per_second']:.1f}", f"{row['transitions_per_second']:.0f}"
        cells = [str(row["images"]), rollout, *shares, f"{row['rollout_gib']:.1f}", update]
        assert f"| {' | '.join(cells)} |" in page

    def of_product(name: str, size: int, flops: str) -> str:
        return f"{100 * gpu._share_of_product(results[name], size, flops):.0f} %"

    (one,) = results["sd15 update"]["rows"]
    assert f"an update takes {one['update_gib']:.1f} GiB; the target" in page
    assert f"It learns from {one['transitions_per_second']:.0f} transitions per second then" in page
    assert f"runs at {of_product('sd15 update', 1, 'update_flops')} of the matrix product" in page
    assert f"with 4 at a time at {of_product('sd15', 16, 'update_flops')}." in page
    assert f"with guidance, it runs at {of_product('sd15', 16, 'rollout_flops')}." in page
    assert f"it runs at {of_product('sd15 denoiser', 32, 'flops')} with 32 samples" in page
    assert f"Diffusion 3 medium at {of_product('sd3 denoiser', 32, 'flops')}." in page
    # Eight samples at a time, which the computed time on several GPUs takes: four images with guidance.
    assert Cluster().flops == pytest.approx(rows[2]["rollout_flops"], rel=0.01)
    assert Cluster().flops == pytest.approx(rows[2]["update_flops"], rel=0.01)
