"""Sphinx configuration: sphinx-build -W -b html docs build/docs."""

import inspect
import pathlib
import re
import shutil
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import numpyro_maf  # noqa: E402

project = "numpyro_maf"
author = "Contributors to the numpyro_maf project"
copyright = author
version = release = numpyro_maf.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs are those that notebooks/run.py --save stored

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"
add_module_names = False

exclude_patterns = ["build", "_build"]
html_theme = "furo"
html_title = f"numpyro_maf {release}"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
pygments_style = "friendly"
pygments_dark_style = "monokai"

# Notebooks live beside docs, where people and make notebooks find them; the site needs them inside.
inside = HERE / "notebooks"
inside.mkdir(exist_ok=True)
for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
    if (
        not (inside / notebook.name).exists()
        or notebook.read_bytes() != (inside / notebook.name).read_bytes()
    ):
        shutil.copy(notebook, inside / notebook.name)

# What builders share is documented with maf, and shown at each of them.
SHARED = dict(re.findall(r":param (\w+): (.*?)(?=\n:|\Z)", inspect.getdoc(numpyro_maf.maf) or "", re.S))
BUILDERS = (
    "iaf", "nsf", "made", "realnvp", "nice", "glow", "flowpp", "nis", "circular", "ffjord", "elementwise",
)  # fmt: skip


def share_parameters(app, what, name, obj, options, lines):
    """Describe the parameters of a builder that its own docstring leaves to maf's."""
    if what != "function" or name.split(".")[-1] not in BUILDERS:
        return
    given = set(re.findall(r"^:param (\w+):", "\n".join(lines), re.M))
    # ``a``, ``b``: several parameters in one description name the others inside of it.
    given |= set(re.findall(r"``(\w+)``:", "\n".join(lines)))
    missing = [p for p in inspect.signature(obj).parameters if p not in given and p in SHARED]
    described = {p: [f":param {p}: {' '.join(SHARED[p].split())}"] for p in missing}
    blocks, order = {}, list(inspect.signature(obj).parameters)
    body, at = [], None
    for line in lines:
        found, other = re.match(r":param (\w+):", line), re.match(r":(raises|return)", line)
        at = found.group(1) if found else line if other else at
        (body if at is None else blocks.setdefault(at, [])).append(line)
    ends = [key for key in blocks if key.startswith(":")]
    blocks |= described
    while body and not body[-1].strip():
        body.pop()
    lines[:] = [*body, ""]
    for key in [
        *(p for p in order if p in blocks),
        *(k for k in blocks if k not in order and k not in ends),
        *ends,
    ]:
        lines.extend(line for line in blocks[key] if line.strip())
    lines.append("")


def setup(app):
    app.connect("autodoc-process-docstring", share_parameters)
