"""Checksums of files."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.checksums import write_checksums


def test_checksums_are_those_of_the_tool(tmp_path: Path) -> None:
    for name in ("weights", "results"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(name.encode())
    files = [tmp_path / "weights" / "file", tmp_path / "results" / "file", tmp_path / "none"]
    path = tmp_path / "results" / "SHA256SUMS"
    write_checksums(files, path)
    assert [line.split("  ") for line in path.read_text().splitlines()] == [
        [hashlib.sha256(b"weights").hexdigest(), "../weights/file"],
        [hashlib.sha256(b"results").hexdigest(), "file"],
    ]
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum")
    check = ["sha256sum", "-c", "SHA256SUMS"]
    assert subprocess.run(check, cwd=path.parent, check=False).returncode == 0
    (tmp_path / "weights" / "file").write_bytes(b"others")
    assert subprocess.run(check, cwd=path.parent, check=False).returncode == 1
