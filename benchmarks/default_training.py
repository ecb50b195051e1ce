"""The default ``dpok train`` over several seeds: ``python -m benchmarks.default_training``.

Runs the command as a user would, one process a seed, and prints what came out, with the wall time and the largest
resident memory of the whole process. Finished seeds are kept in ``--out`` and not run again.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table


def run(folder: Path, seed: int) -> dict:
    """One training run; its summary with the time and memory of the process."""
    record = folder / f"seed{seed}.json"
    if not record.exists():
        shutil.rmtree(folder / f"seed{seed}", ignore_errors=True)  # interrupted: gone on with, its time would be wrong
        started = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "agents.cli.main",
            "train",
            "--seed",
            str(seed),
            "--out",
            str(folder / f"seed{seed}"),
        ]
        subprocess.run(command, check=True)
        summary = json.loads((folder / f"seed{seed}" / "summary.json").read_text())
        summary["wall_seconds"] = time.perf_counter() - started
        # The largest of all children so far; each run takes about the same, so this is an upper bound for each.
        summary["peak_gib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        record.write_text(json.dumps(summary, indent=2) + "\n")
    return json.loads(record.read_text())


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/default_training"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    columns = ("aligned before", "after", "quality before", "after", "KL, nats", "pictures", "seconds", "GiB")
    table = Table("seed", *columns, title="dpok train")
    for seed in range(options.seeds):
        found = run(options.out, seed)
        table.add_row(
            str(seed),
            f"{found['aligned_before']:.3f}",
            f"{found['aligned_after']:.3f}",
            f"{found['quality_before']:.3f}",
            f"{found['quality_after']:.3f}",
            f"{found['kl_to_pretrained']:.1f}",
            str(found["pictures"]),
            f"{found['wall_seconds']:.0f}",
            f"{found['peak_gib']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
