"""Results as data, as JSON and as a self-contained HTML page. Nothing here prints."""

from kdtl_jax.run.report._intervals import Interval as Interval
from kdtl_jax.run.report._intervals import difference as difference
from kdtl_jax.run.report._intervals import holm as holm
from kdtl_jax.run.report._intervals import interval as interval
from kdtl_jax.run.report._page import Definitions as Definitions
from kdtl_jax.run.report._page import Section as Section
from kdtl_jax.run.report._page import Table as Table
from kdtl_jax.run.report._page import environment_section as environment_section
from kdtl_jax.run.report._page import html_page as html_page
from kdtl_jax.run.report._page import page as page
from kdtl_jax.run.report._page import percent as percent
from kdtl_jax.run.report._page import run_sections as run_sections
from kdtl_jax.run.report._page import table as table
from kdtl_jax.run.report._pictures import Picture as Picture
from kdtl_jax.run.report._pictures import Pictures as Pictures
from kdtl_jax.run.report._pictures import png as png
from kdtl_jax.run.report._results import ACCURACY as ACCURACY
from kdtl_jax.run.report._results import SCHEMA_VERSION as SCHEMA_VERSION
from kdtl_jax.run.report._results import Results as Results
from kdtl_jax.run.report._results import Row as Row
from kdtl_jax.run.report._results import Score as Score
from kdtl_jax.run.report._results import Versus as Versus
from kdtl_jax.run.report._results import compared as compared
from kdtl_jax.run.report._results import environment as environment
from kdtl_jax.run.report._results import to_json as to_json
