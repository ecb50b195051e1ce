"""How long ``import dpok_gym`` takes, over ``import gymnasium`` alone: ``python -m benchmarks.import_time``."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def seconds(statement: str) -> float:
    """Wall time of a fresh interpreter that runs the statement."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Alternates the two, so that a noisy machine disturbs both alike."""
    pairs = [(seconds("import gymnasium"), seconds("import dpok_gym")) for _ in range(9)]
    base, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"import gymnasium {base:.3f} s, import dpok_gym {ours:.3f} s: {ours - base:+.3f} s, median of {len(pairs)}")


if __name__ == "__main__":
    main()
