"""How the pages of this folder become a site: `make docs`. Nothing is fetched from the network."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from avprep import __version__

project = "avprep + avtrain"
author = copyright = "the avprep and avtrain contributors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_click"]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]

myst_heading_anchors = 3  # for links such as results.md#esc-10

default_role = "code"  # what stands in single backticks in a docstring
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_mock_imports = ["ray", "triton"]  # an extra; and what comes with torch for CUDA alone
autodoc_typehints_format = "short"
napoleon_use_ivar = True  # else the fields of named tuples are there twice
suppress_warnings = ["ref.python"]  # an attribute that several classes have, such as `visual`, is linked to none

html_theme = "furo"
html_title = project
html_copy_source = False


def _escape_stars(app, context, lines):
    """In the help of an option a star is a star: transfer.*"""
    lines[:] = [re.sub(r"(?<!\*)\*(?!\*)", r"\\*", line) for line in lines]


def _plain_text(app, what, name, obj, options, lines):
    """A name that ends in an underscore is no link; what stands before a colon in a field's text is not its type, as
    napoleon, which was here before, has it."""
    lines[:] = [re.sub(r"(?<![\w`])(\w+)_(?!\w)", r"\1\_", line) for line in lines]
    taken = next((line for line in lines if line.startswith(":type: ")), None)
    if what == "attribute" and taken:
        lines.remove(taken)
        lines[0] = f"{taken.removeprefix(':type: ')}: {lines[0]}"


def setup(app):
    app.connect("sphinx-click-process-options", _escape_stars)
    app.connect("autodoc-process-docstring", _plain_text, priority=600)
