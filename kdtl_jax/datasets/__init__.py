"""Labeled data on the host: the embedded digits, readers for files, fixed splits."""

from kdtl_jax.datasets._dataset import Dataset as Dataset
from kdtl_jax.datasets._dataset import checked as checked
from kdtl_jax.datasets._dataset import digits as digits
from kdtl_jax.datasets._preprocessing import KINDS as KINDS
from kdtl_jax.datasets._preprocessing import Column as Column
from kdtl_jax.datasets._preprocessing import Images as Images
from kdtl_jax.datasets._preprocessing import Kind as Kind
from kdtl_jax.datasets._preprocessing import Preprocessing as Preprocessing
from kdtl_jax.datasets._preprocessing import Standardizer as Standardizer
from kdtl_jax.datasets._preprocessing import from_json as from_json
from kdtl_jax.datasets._preprocessing import to_json as to_json
from kdtl_jax.datasets._readers import read as read
from kdtl_jax.datasets._readers import read_csv as read_csv
from kdtl_jax.datasets._readers import read_idx as read_idx
from kdtl_jax.datasets._readers import read_idx_array as read_idx_array
from kdtl_jax.datasets._readers import read_npz as read_npz
from kdtl_jax.datasets._splits import EXPECTED as EXPECTED
from kdtl_jax.datasets._splits import Splits as Splits
from kdtl_jax.datasets._splits import only_classes as only_classes
from kdtl_jax.datasets._splits import per_class as per_class
from kdtl_jax.datasets._splits import read_splits as read_splits
from kdtl_jax.datasets._splits import standardized as standardized
from kdtl_jax.datasets._splits import standardizer as standardizer
from kdtl_jax.datasets._splits import stratified as stratified
