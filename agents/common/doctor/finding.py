"""The result of one check of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed", "not checked"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was checked.
        status: "failed" if the training would be wasted, "warning" if it may be, "not checked" if this could not be
            measured or the noise hides it.
        measured: what was measured, with units.
        normal: what is normal.
        advice: what to do if it is not.
    """

    name: str
    status: Status
    measured: str
    normal: str
    advice: str = ""


def judge(name: str, measured: str, normal: str, advice: str, failed: bool, warning: bool = False) -> Finding:
    """Returns a finding that has failed, is a warning or is ok."""
    status: Status = "failed" if failed else "warning" if warning else "ok"
    return Finding(name, status, measured, normal, advice)
