"""Memory of a long run: ``python -m benchmarks.long_run``.

It runs ``dpok train`` on the mixture world, with small iterations, and prints the resident memory of the process as the
iterations go by. After a tenth of them (imports, first checkpoints, TensorBoard's buffers), the memory must not grow by
more than 5 %: it ends with an error if it does.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

#: Images of an iteration, and denoising steps of an image.
N_ENVS, STEPS = 4, 2
#: Share of the iterations that warm up, and the growth that is allowed after them.
WARM_UP, GROWTH = 0.1, 1.05


def train(iterations: int, algo: str, folder: Path, seconds: float = 0.5) -> list[tuple[int, float]]:
    """Runs ``dpok train``; returns the iterations done and the resident memory in MiB, from time to time.

    Args:
        iterations: number of iterations.
        algo: name of the algorithm.
        folder: the run folder.
        seconds: between two looks at the process.

    Raises:
        RuntimeError: if the run fails.
    """
    command = [sys.executable, "-m", "agents", "train", "--env", "DPOK-Mixture-v0", "--algo", algo]
    command += ["--out", str(folder), "--images", str(iterations * N_ENVS), "--n-envs", str(N_ENVS)]
    command += ["--num-inference-steps", str(STEPS), "--eval-images", "4", "--device", "cpu"]
    command += ["--images-per-iteration", str(N_ENVS)]
    log, points = folder / "progress.csv", []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(seconds)
            done = log.read_bytes().count(b"\n") - 1 if log.is_file() else 0
            if done > 0 and (resident := resident_mib(process.pid)) is not None:
                points.append((done, resident))
    if process.returncode:
        raise RuntimeError(f"the run ended with exit code {process.returncode}")
    return points


def resident_mib(pid: int) -> float | None:
    """Returns the resident memory of a process in MiB; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    sizes = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")]
    return sizes[0] / 1024 if sizes else None


def growth(points: Sequence[tuple[int, float]], iterations: int) -> float:
    """Returns the memory at the end, divided by that after the warm-up: medians of a tenth of the iterations each."""
    early = [mib for done, mib in points if WARM_UP <= done / iterations < 2 * WARM_UP]
    late = [mib for done, mib in points if 1 - WARM_UP <= done / iterations < 1]
    return statistics.median(late) / statistics.median(early)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, prints the memory, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--algo", default="dpok")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        points = train(options.iterations, options.algo, Path(folder) / "run")
    for k in range(11):  # the nearest point to each tenth
        done, mib = min(points, key=lambda point: abs(point[0] - k * options.iterations / 10))
        print(f"{done:>8,} iterations: {mib:.0f} MiB")
    ratio = growth(points, options.iterations)
    print(f"growth after the first tenth: {ratio - 1:+.1%}")
    if ratio > GROWTH:
        raise RuntimeError(f"the memory grew by {ratio - 1:.1%}; at most {GROWTH - 1:.0%} is allowed")


if __name__ == "__main__":
    main()
