"""How the site is built: `make docs` (Sphinx, MyST, furo). Pages load nothing from elsewhere, and building needs no
network: equations are plain text, and the reference is made from the code (`_ext`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from rnn_longctx.version import __version__

project = "rnn-longctx"
author = "the rnn-longctx authors"
copyright = "Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "filling"]
exclude_patterns = ["_ext"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
highlight_language = "none"  # indented blocks are command lines and equations
smartquotes = False  # it makes one dash of two, in options

html_theme = "furo"
html_title = "rnn-longctx"
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
