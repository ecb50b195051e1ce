"""Settings of the documentation's site. From the root of the repository, this command builds it:

sphinx-build -W --keep-going docs docs/_build/html
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

project = "dpok-gym"
author = "The dpok-gym contributors"
project_copyright = "The dpok-gym contributors. Text: CC BY 4.0. Code: Apache 2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "docs.site.generated",
    "docs.site.formulas",
]
exclude_patterns = ["_build"]
smartquotes = False  # it would turn the hyphens of options into dashes

html_theme = "furo"
html_title = "dpok-gym"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_math_renderer = "mathml"

myst_enable_extensions = ["amsmath", "attrs_inline", "deflist", "dollarmath"]
myst_heading_anchors = 4

# Labs run once for each state of their code; the results are kept in docs/_build/.jupyter_cache.
nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
