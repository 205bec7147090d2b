"""The documentation's settings. Build: sphinx-build -W docs docs/_build"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "kdtl_jax"
author = "The kdtl_jax authors"
extensions = ["myst_parser", "sphinx_gallery.gen_gallery", "equations", "generated", "cards"]
exclude_patterns = ["_build", "_ext", "notebooks"]
# Scripts that run when the site is built, and are shown with their plots.
sphinx_gallery_conf = {
    "examples_dirs": "notebooks",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("figures.svg",),
    "reset_modules": ("matplotlib", "figures.style"),
    "abort_on_example_error": True,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 10**6,  # seconds, which belong to the machine: none is shown
    "remove_config_comments": True,
    "doc_module": ("kdtl_jax",),
    "reference_url": {"kdtl_jax": None},
}
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
