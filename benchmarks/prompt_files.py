"""Large files of prompts: ``python -m benchmarks.prompt_files``.

For files of 10,000, 100,000 and 1,000,000 distinct prompts it prints the seconds that an environment takes to read and
to check all of them, the memory that they take, and the time to draw a prompt, with and without weights. Each file is
read in a process of its own, after the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.long_run import resident_mib
from dpok_gym import DenoisingVectorEnv
from dpok_gym.models import load_model

#: Prompts that are drawn one by one, as a training draws them.
DRAWN = 1000


def write(path: Path, n_prompts: int) -> None:
    """Writes distinct prompts of words that the model of the shapes knows.

    Args:
        path: of the file. If it ends with ".jsonl", each line is an object with a weight, else it is the prompt.
        n_prompts: number of prompts.
    """
    words = load_model("shapes", "cpu").tokenizer.init_kwargs["words"]  # type: ignore[attr-defined]
    rng, prompts = random.Random(0), dict[str, float]()
    while len(prompts) < n_prompts:
        prompts[" ".join(rng.choices(words, k=10))] = rng.random()
    with path.open("w", encoding="utf-8") as file:
        for prompt, weight in prompts.items():
            line = json.dumps({"prompt": prompt, "weight": weight}) if path.suffix == ".jsonl" else prompt
            file.write(line + "\n")


def measure(path: Path) -> dict[str, float]:
    """Returns the seconds and MiB to make an environment with a file of prompts, and the microseconds of a draw."""
    load_model("shapes", "cpu")
    before, started = resident_mib(os.getpid()) or 0.0, time.perf_counter()
    env = DenoisingVectorEnv(1, model="shapes", prompts=str(path), reward="jpeg-compressibility", device="cpu")
    seconds, after = time.perf_counter() - started, resident_mib(os.getpid()) or 0.0
    rng, started = np.random.default_rng(0), time.perf_counter()
    for _ in range(DRAWN):
        env.prompts.sample(rng, 1)
    microseconds = 1e6 * (time.perf_counter() - started) / DRAWN
    return {"seconds": seconds, "mib": after - before, "microseconds": microseconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--file", type=Path, help="measure this file, and print JSON")
    options = parser.parse_args(arguments)
    if options.file:
        print(json.dumps(measure(options.file)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for n_prompts in options.lines:
            for name in ("prompts.txt", "weighted.jsonl"):
                path = Path(folder) / name
                write(path, n_prompts)
                command = [sys.executable, "-m", "benchmarks.prompt_files", "--file", str(path)]
                result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"{n_prompts:>9,} prompts, {name}: {result['seconds']:.2f} s, {result['mib']:.0f} MiB, "
                    f"{result['microseconds']:.0f} us for a draw"
                )


if __name__ == "__main__":
    main()
