"""Many images side by side: ``python -m benchmarks.large_run``.

``dpok train`` draws 10,000 images of the mixture world side by side, learns from them and saves; ``--resume`` then does
so once more. It prints the seconds, the largest memory and the size of the checkpoint, and ends with an error above
2 GiB.

Most of the memory is that of PyTorch (0.5 GiB), of the images in 8 bits, and of the 4,096 images that are scored
together. The embedded world of shapes also needs 0.25 MiB for each image side by side, for its denoiser. There,
``--n-envs 256 --images-per-iteration 10000`` learns from as many images in less than 1 GiB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from agents.common.checkpoint import find_checkpoint

#: Largest memory that is allowed, in GiB.
MOST_GIB = 2.0


class Cost(NamedTuple):
    """The costs of a command: its seconds, its largest resident memory, and the size of the newest checkpoint."""

    seconds: float
    processor_seconds: float
    peak_gib: float
    checkpoint_mib: float


def train(folder: Path, words: Sequence[str]) -> Cost:
    """Runs ``dpok train``.

    Args:
        folder: the run folder.
        words: the other arguments of the command.

    Raises:
        RuntimeError: if the command fails.
    """
    words = ["--out", str(folder), *words]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "agents", "train", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"dpok train {' '.join(words)} ended with exit code {process.returncode}")
    size = sum(file.stat().st_size for file in find_checkpoint(folder).iterdir())
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20, size / 2**20)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, resumes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-envs", type=int, default=10_000)
    parser.add_argument("--algo", default="dpok")
    options = parser.parse_args(arguments)
    n_envs = str(options.n_envs)
    new = ["--env", "DPOK-Mixture-v0", "--algo", options.algo, "--device", "cpu", "--eval-images", "64"]
    new += ["--n-envs", n_envs, "--images-per-iteration", n_envs, "--images", n_envs]
    resumed = ["--resume", "--images", str(2 * options.n_envs)]
    with tempfile.TemporaryDirectory() as folder:
        for words, what in ((new, "new run"), (resumed, "resumed")):
            cost = train(Path(folder) / "run", words)
            print(
                f"{what}: {options.n_envs:,} images side by side in {cost.seconds:.0f} s, with {cost.peak_gib:.2f} "
                f"GiB; the checkpoint has {cost.checkpoint_mib:.2f} MiB"
            )
            if cost.peak_gib > MOST_GIB:
                raise RuntimeError(f"the run took {cost.peak_gib:.2f} GiB; at most {MOST_GIB} are allowed")


if __name__ == "__main__":
    main()
