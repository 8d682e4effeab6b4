"""Sphinx configuration: sphinx-build -W -b html docs build/docs."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpyro_maf  # noqa: E402

project = "numpyro_maf"
author = "Contributors to the numpyro_maf project"
copyright = author
version = release = numpyro_maf.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"
add_module_names = False

exclude_patterns = ["build", "_build"]
html_theme = "furo"
html_title = f"numpyro_maf {release}"
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
