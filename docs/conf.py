"""The documentation's settings. Build: sphinx-build -W docs docs/_build"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "kdtl_jax"
author = "The kdtl_jax authors"
extensions = ["myst_parser", "equations", "generated", "cards"]
exclude_patterns = ["_build", "_ext"]
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "kdtl_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
smartquotes_action = "q"  # `--flag` keeps its dashes
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"
# Types in signatures are short names, of which a few mean different classes in different modules.
suppress_warnings = ["ref.python"]
