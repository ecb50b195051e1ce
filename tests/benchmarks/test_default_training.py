"""The default training: records are kept, and another checkout runs in turn."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import default_training

#: A command that leaves a summary, and a trace of its call beside the checkout.
COMMAND = """
import json, pathlib, sys
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
seed, out = int(options["--seed"]), pathlib.Path(options["--out"])
with open(pathlib.Path.cwd().parent / "calls", "a") as calls:
    calls.write(f"{pathlib.Path.cwd().name} {sys.argv[1]} {seed}\\n")
scores = {"aligned_before": 0.5, "aligned_after": 1.0, "quality_before": 0.5, "quality_after": 1.0}
out.mkdir()
(out / "summary.json").write_text(json.dumps(scores | {"kl_to_pretrained": 1.0, "pictures": 64, "seed": seed}))
sys.exit(3 if seed == 9 else 0)
"""


def make_checkout(folder: Path, module: str) -> Path:
    package = folder / "agents"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / module).write_text(COMMAND)
    return folder


def test_two_checkouts_run_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = make_checkout(tmp_path / "new", "__main__.py"), make_checkout(tmp_path / "old", "cli.py")
    monkeypatch.setattr(default_training, "ROOT", ours)
    words = ["--seeds", "2", "--out", str(tmp_path / "runs"), "--against", str(theirs)]
    default_training.main(words)
    calls = (tmp_path / "calls").read_text()
    assert calls.splitlines() == ["new train 0", "old train 0", "old train 1", "new train 1"]
    printed = capsys.readouterr().out
    records = [json.loads((tmp_path / "runs" / f"seed{seed}.json").read_text()) for seed in range(2)]
    others = [json.loads((tmp_path / "runs" / "against" / f"seed{seed}.json").read_text()) for seed in range(2)]
    ratios = [mine["wall_seconds"] / other["wall_seconds"] for mine, other in zip(records, others, strict=True)]
    assert [f"ratio {ratio:.3f}" in printed for ratio in ratios] == [True, True]
    assert f"median ratio {sum(ratios) / 2:.3f}" in printed
    assert all(record["peak_gib"] > 0 for record in records)
    # All is kept: nothing runs again.
    default_training.main(words)
    assert (tmp_path / "calls").read_text() == calls


def test_options_go_to_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = make_checkout(tmp_path / "new", "__main__.py")
    (checkout / "agents" / "__main__.py").write_text(COMMAND.replace("{seed}", "{seed} {options['--precision']}"))
    monkeypatch.setattr(default_training, "ROOT", checkout)
    default_training.main(["--seeds", "1", "--out", str(tmp_path / "runs"), "--", "--precision", "float32"])
    assert (tmp_path / "calls").read_text() == "new train 0 float32\n"


def test_a_run_that_was_interrupted_begins_anew(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "new", "__main__.py")
    (tmp_path / "runs" / "seed0").mkdir(parents=True)
    assert default_training.run(checkout, tmp_path / "runs", 0)["pictures"] == 64


def test_a_command_that_fails(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "new", "__main__.py")
    with pytest.raises(RuntimeError, match=r"-m agents train --seed 9 .* failed with exit code 3"):
        default_training.run(checkout, tmp_path / "runs", 9)
    assert not (tmp_path / "runs" / "seed9.json").exists()


def test_times_by_hand() -> None:
    def records(*seconds: float) -> list[dict[str, Any]]:
        return [{"seed": seed, "wall_seconds": value} for seed, value in enumerate(seconds)]

    text = default_training.compare_times(records(2.0, 3.0, 8.0), records(1.0, 3.0, 2.0))
    assert text.splitlines() == [
        "seed 0: 2.0 s here, 1.0 s there, ratio 2.000",
        "seed 1: 3.0 s here, 3.0 s there, ratio 1.000",
        "seed 2: 8.0 s here, 2.0 s there, ratio 4.000",
        "median ratio 2.000",
    ]
