"""Formulas as MathML, which browsers draw by themselves: the site needs no JavaScript of others, and works offline."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError


def write_formula(tex: str, as_block: bool) -> str:
    """Returns a formula in MathML.

    Args:
        tex: the formula in LaTeX.
        as_block: whether it stands alone.

    Raises:
        ExtensionError: if it cannot be read.
    """
    try:
        return tex2mathml(tex, as_block=as_block)
    except MathError as error:
        raise ExtensionError(f"the formula {tex!r} cannot be read: {error}") from error


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(write_formula(node.astext(), as_block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{write_formula(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    """Connects the extension to Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
