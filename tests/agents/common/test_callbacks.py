"""Saving an agent: when, and what an interruption leaves."""

from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.callbacks import BaseCallback

from agents import DPOK, plots, run_folder
from agents.common.callbacks import SaveCallback, save_agent
from agents.cli.main import main
from dpok_gym import DenoisingVectorEnv

pytestmark = pytest.mark.usefixtures("fresh_models")

STEPS = 2


def brightness(images: Any, prompts: list[str]) -> Any:
    return images.mean((1, 2, 3))


@pytest.fixture
def agent(tiny_sd_folder: Path) -> DPOK:
    env = DenoisingVectorEnv(
        2, model=str(tiny_sd_folder), prompts="a dog", reward=brightness, num_inference_steps=STEPS, device="cpu"
    )
    return DPOK("DenoisingPolicy", env, seed=0, device="cpu", policy_kwargs={"lora_rank": 2})


def test_the_agent_is_saved_between_rollouts(agent: DPOK, tmp_path: Path) -> None:
    saved = []

    class Watch(BaseCallback):
        def _on_rollout_start(self) -> None:
            saved.append((tmp_path / "model.zip").is_file() and DPOK.load(tmp_path / "model.zip").num_timesteps)

        def _on_step(self) -> bool:
            return True

    agent.learn(5 * 2 * STEPS, callback=[SaveCallback(tmp_path, every=2), Watch()])
    # Before the third and the fifth rollout, with all that came before.
    assert saved == [False, False, 2 * 2 * STEPS, 2 * 2 * STEPS, 4 * 2 * STEPS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "model.zip"]


@pytest.mark.parametrize("method", ["save", "save_lora"])
def test_what_interrupts_a_save_leaves_the_old_file(
    method: str, agent: DPOK, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_agent(agent, tmp_path)
    whole = getattr(DPOK, method)
    name = {"save": "model.zip", "save_lora": "lora/pytorch_lora_weights.safetensors"}[method]
    before = (tmp_path / name).read_bytes()

    def interrupted(agent: DPOK, path: Path) -> None:
        whole(agent, path)
        for file in [path, *path.glob("*")]:
            if file.is_file():
                file.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(DPOK, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_agent(agent, tmp_path)
    assert (tmp_path / name).read_bytes() == before


def test_rows_of_the_log_after_the_last_save_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill: the agent is older than its log."""
    run = tmp_path / "run"
    tiny = [
        "--num-inference-steps",
        "2",
        "--n-envs",
        "2",
        "--lora-rank",
        "2",
        "--eval-pictures",
        "2",
        "--device",
        "cpu",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(
            run_folder, "save_agent", lambda agent, folder: agent.num_timesteps or save_agent(agent, folder)
        )
        patched.setattr(run_folder, "SaveCallback", lambda folder: SaveCallback(folder, every=2))
        assert main(["train", "--out", str(run), "--pictures", "6", *tiny]) == 0
    assert DPOK.load(run / "model.zip").num_timesteps == 4 * STEPS
    assert [row["rollout/pictures"] for row in plots.read_log(run / "progress.csv")] == [2, 4, 6]
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert [row["rollout/pictures"] for row in plots.read_log(run / "progress.csv")] == [2, 4, 6]
    assert DPOK.load(run / "model.zip").num_timesteps == 6 * STEPS
