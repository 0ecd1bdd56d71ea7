"""Sphinx's settings: guides run as the site is built, the reference is the docstrings."""

import re

import raclora_jax

project = "raclora_jax"
author = "The raclora_jax authors"
copyright = author
release = raclora_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Every cell runs at every build, and one that fails fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_merge_streams = True

autodoc_mock_imports = ["tunix"]
autodoc_member_order = "bysource"
autodoc_type_aliases = {
    name: name for name in ("PyTree", "KeyLike", "Leaf", "Leaves", "Scalar")
}
maximum_signature_line_length = 72
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = "raclora_jax"
html_theme_options = {"show_toc_level": 2, "use_download_button": False}


def spaced(app, what, name, obj, options, lines):
    """Lets a plural follow a literal in docstrings, as in ``Spec``s."""
    lines[:] = [re.sub(r"(``[^`]+``)s\b", r"\1\\ s", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", spaced)
