"""Formulas as MathML, which browsers draw by themselves: the site needs no JavaScript of others, and works offline."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)

#: LaTeX that docutils does not know, and what stands for it.
_OTHER_WORDS = ((r"\\dots\b", r"\\ldots"), (r"\\([bB]igg?)(?![a-zA-Z])", r"\\\1l"))


def write_formula(node: nodes.Element, as_block: bool) -> str:
    """Returns a formula in MathML; one that cannot be read is a warning, and stays in LaTeX.

    Args:
        node: the formula.
        as_block: whether it stands alone.
    """
    tex = node.astext()
    known = tex
    for pattern, word in _OTHER_WORDS:
        known = re.sub(pattern, word, known)
    try:
        return tex2mathml(known, as_block=as_block)
    except MathError as error:
        logger.warning("the formula %r cannot be read: %s", tex, error, location=node)
        return escape(tex)


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(write_formula(node, as_block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{write_formula(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    """Connects the extension to Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
