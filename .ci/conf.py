"""Settings of Sphinx for `make html`, which writes _site/: it needs no server and no network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import course  # noqa: E402

project = html_title = "Whisper from scratch"
extensions = ["myst_nb", "course"]
root_doc = "README"
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".py": "myst-nb"}
include_patterns = [*course.PAGES, *course.PROGRAMS]
exclude_patterns = [".venv", ".git", "_site", "_proc", "build", "runs"]
nb_execution_mode = "off"  # notebooks are shown as they were run
highlight_language = "none"  # of blocks that name none
nb_merge_streams = True
nb_ipywidgets_js = {}  # these would come from the network
myst_enable_extensions = ["attrs_block", "dollarmath"]
myst_heading_anchors = 6
myst_heading_slug_func = "course.slug"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = html_show_sphinx = html_use_index = False
html_show_search_summary = False  # a page on a disk cannot read another one
pygments_style, pygments_dark_style = "default", "github-dark"
