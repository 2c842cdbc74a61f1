"""Sphinx: `sphinx-build -W --keep-going -b html docs docs/_build`."""

from fusekit import __version__

project = "fusekit"
author = "The fusekit authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "fusekit"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
highlight_language = "text"  # blocks without a language are output and commands

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes and dtypes, which annotations do not
napoleon_google_docstring = True
napoleon_use_ivar = True
