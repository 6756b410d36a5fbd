"""How Sphinx builds these pages: `sphinx-build -W docs build/docs`."""

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # else the modules of GPU kernels need a GPU's driver
sys.path.insert(0, str(Path(__file__).parents[1]))

from sphinx.application import Sphinx
from sphinx.util import logging

import lightning_sae

project = "lightning_sae"
author = copyright = "The lightning_sae authors"
version = release = lightning_sae.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"lightning_sae {version}"
html_show_sourcelink = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings mark code with single backticks: a link where it names something documented here.
default_role = "py:obj"
add_module_names = False
maximum_signature_line_length = 80  # longer ones have a line for each parameter
toc_object_entries_show_parents = "hide"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else attributes that are properties too would be listed twice
napoleon_use_rtype = False


def check_public_names(app: Sphinx, env: Any) -> None:
    """Warn, which fails the build, of each name that a room exports and no page documents."""
    objects = env.domains["py"].objects
    documented = set(objects)
    # A function may be called as the file it is in: then the page is about the function.
    for room in sorted(name for name, each in objects.items() if each.objtype == "module"):
        for name in getattr(importlib.import_module(room), "__all__", ()):
            if not any(d.startswith(f"{room}.") and d.endswith(f".{name}") for d in documented):
                logging.getLogger(__name__).warning("%s.%s is on no page", room, name)


def mark_ends_of_code(app: Sphinx, *about: Any) -> None:
    """Let docstrings speak of `Name`s: reStructuredText wants a mark between code and the s."""
    lines: list[str] = about[-1]
    lines[:] = [re.sub(r"(?<=\w)`(?=s\b)", r"`\\ ", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Have Sphinx call what is above."""
    app.connect("autodoc-process-docstring", mark_ends_of_code)
    app.connect("env-check-consistency", check_public_names)
