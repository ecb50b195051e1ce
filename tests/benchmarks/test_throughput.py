"""The measurement of speed and memory."""

import json
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from benchmarks import random_model, throughput
from dpok_gym.prompts import load_prompts

CPU = torch.device("cpu")


class Sleeper:
    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"


def test_the_seconds_of_a_method_are_added_up() -> None:
    owner, spent = Sleeper(), defaultdict[str, float](float)
    with throughput.timed(owner, "sleep", spent, "sleeping", CPU):
        assert owner.sleep(0.02) == "slept"
        assert owner.sleep(0.03) == "slept"
    assert 0.05 <= spent["sleeping"] < 1
    known = dict(spent)
    owner.sleep(0.01)  # the method is as it was
    assert dict(spent) == known
    assert "sleep" not in vars(owner)


def test_64_images_by_default() -> None:
    assert throughput.parse([]).images == [64]


@pytest.mark.slow
def test_shares_of_a_rollout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    words = ["--images", "2", "--num-inference-steps", "2", "--rollouts", "1", "--device", "cpu", "--out", str(file)]
    throughput.main(words)
    (row,) = json.loads(file.read_text())["rows"]
    assert row["images"] == 2
    shares = row["shares"]
    assert set(shares) == {"denoiser", "text encoder", "decoder", "reward", throughput.OUTSIDE}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0 < share < 1 for share in shares.values())
    assert f"{shares[throughput.OUTSIDE]:6.1%} {throughput.OUTSIDE}" in capsys.readouterr().out
    rates = ("images_per_second", "transitions_per_second", "rollout_flops", "update_flops")
    assert all(row[name] > 0 for name in rates)


def test_the_random_model_reads_the_papers_prompts() -> None:
    tokenizer = random_model._make_tokenizer()
    for prompt in load_prompts("dpok").train:
        tokens = tokenizer(prompt)["input_ids"]
        assert len(tokens) <= tokenizer.model_max_length
        # Lower case, letter by letter: nothing is lost.
        assert "".join(tokenizer.decode(tokens, skip_special_tokens=True).split()) == prompt.lower().replace(" ", "")
