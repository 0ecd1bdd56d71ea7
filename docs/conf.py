"""Sphinx's settings: guides run as the site is built, the reference is the docstrings."""

import json
import os
import pathlib
import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import raclora_jax

project = "raclora_jax"
author = "The raclora_jax authors"
copyright = author
release = raclora_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute"]
templates_path = ["_templates"]

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
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "navbar_persistent": [],  # or there is a second search beside the sidebar's
    "article_header_start": ["toggle-primary-sidebar.html", "version.html"],
}
# The workflow that builds the site knows where the repository is.
where = [os.environ.get(name) for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY")]
if all(where):
    html_theme_options |= {
        "repository_url": "/".join(where),
        "path_to_docs": "docs",
        "use_repository_button": True,
        "use_edit_page_button": True,
    }


def formula(writer, node):
    """Writes a formula as MathML, which browsers draw by themselves."""
    block = isinstance(node, nodes.math_block)
    tag = "div" if block else "span"
    writer.body.append(writer.starttag(node, tag, "", CLASS="math"))
    writer.body.append(tex2mathml(node.astext(), as_block=block) + f"</{tag}>")
    raise nodes.SkipNode


def spaced(app, what, name, obj, options, lines):
    """Lets a plural follow a literal in docstrings, as in ``Spec``s."""
    lines[:] = [re.sub(r"(``[^`]+``)s\b", r"\1\\ s", line) for line in lines]


def plain(app, env):
    """Takes out of Start's notebook what only this site can read: terms and links."""
    path = pathlib.Path(env.mystnb_config.output_folder, "start.ipynb")
    if not path.exists():
        return
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            text = re.sub(r"\{[a-z-]+\}`([^`<]+?)(?: <.*>)?`", r"*\1*", text)
            cell["source"] = re.sub(r"\[([^]]+)\]\((?!http)[^)]+\)", r"\1", text)
    path.write_text(json.dumps(notebook, indent=1))


def setup(app):
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("autodoc-process-docstring", spaced)
    app.connect("env-updated", plain)
