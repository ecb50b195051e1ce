"""Formulas become MathML; one that cannot be read is a warning, which stops the build of the site."""

from __future__ import annotations

import logging

import pytest
from docutils import nodes
from sphinx.util.logging import NAMESPACE

from docs.site.formulas import write_formula


@pytest.mark.parametrize(
    "tex",
    [
        r"\mathbb{E}\left[\sum_t -\alpha A_t\, \rho_t\right]",
        r"\mathrm{KL}\bigl(p_\theta \,\|\, p_{\mathrm{pre}}\bigr)",
        r"r_i + \gamma r_{i+1} + \dots",
        r"E\Big[ r(x_0) \Big]",
    ],
)
def test_formulas_are_read(tex: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, NAMESPACE):
        written = write_formula(nodes.math_block(text=tex), as_block=True)
    assert written.startswith("<math")
    assert not caplog.records


def test_a_formula_that_cannot_be_read_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(NAMESPACE), "propagate", True)
    with caplog.at_level(logging.WARNING):
        written = write_formula(nodes.math(text=r"\notacommand{x} < 1"), as_block=False)
    assert written == r"\notacommand{x} &lt; 1"
    assert "cannot be read" in caplog.text
