"""The time that ``import dpok_gym`` adds to ``import gymnasium``: ``python -m benchmarks.import_time``."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

#: Pairs of measurements.
N_PAIRS = 9


def seconds(statement: str) -> float:
    """Measures the wall time of a fresh interpreter that runs a statement."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measures the two in turn, so that a noisy machine disturbs both alike; prints the medians."""
    pairs = [(seconds("import gymnasium"), seconds("import dpok_gym")) for _ in range(N_PAIRS)]
    base, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"import gymnasium {base:.3f} s, import dpok_gym {ours:.3f} s: {ours - base:+.3f} s, median of {N_PAIRS}")


if __name__ == "__main__":
    main()
