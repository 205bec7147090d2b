"""Parameter transforms: pytree in, pytree out.

Only inexact arrays are changed; counters, PRNG keys and functions pass through, and quantized
integer codes are an error. Leaves keep their dtypes, and the target keeps its structure. `where`
always means *act here*.

Trees are any pytrees. Functions of several trees take trees of one structure and shapes (a list of
models, or a base and models) and return one with the first tree's structure, dtypes and non-inexact
leaves; task vectors are float32 or wider. They raise ValueError where names or shapes differ,
listing all differences, where there is not one weight per tree or weights that divide sum to 0, and
for a coefficient or hyper-parameter outside its stated range; a coefficient that is no real number
raises TypeError. A coefficient per leaf is a number, a traced scalar, or anything else that `scale`
takes as alpha.

- One tree: `scale`, `scale_homogeneous`, `fit_alpha`.
- From a source into a target: `transfer`, or `plan_transfer` and `apply_plan`, with renames,
  policies for leaves of another shape, and a `Report`; `replace_head`, `remap_units`, `layer_map`.
- Width, with named axes: `select_width`, `prune_heads`, `permute_units`, `pad_width`, `widen`,
  `match_permutations`; which units: `uniform_indices`, `top_indices`, `importance_by_*`.
- Depth: `select_layers`, `deepen`, `stack_layers`, `unstack_layers`.
- Leaves with a geometry: `resize_positions`, `resize_patch_kernel`, `adapt_input_channels`.
- Low rank: `factor_low_rank`, `rank_for_energy`, `truncate_rank`.
- Low precision: `fake_quantize` with `int_per_channel`, `int_by_group`, `mxfp4`, `nvfp4`.
- Several trees: `interpolate`, `average`, `ema`, task vectors, and the merging methods.
- Adapters: pytrees that represent a change of the weights, such as LoRA.
"""

from kdtl_jax.transforms._adapters import AdaptedParams as AdaptedParams
from kdtl_jax.transforms._adapters import Adapter as Adapter
from kdtl_jax.transforms._adapters import AdapterWeights as AdapterWeights
from kdtl_jax.transforms._adapters import adapted_model as adapted_model
from kdtl_jax.transforms._alignment import match_permutations as match_permutations
from kdtl_jax.transforms._average import apply_task_vectors as apply_task_vectors
from kdtl_jax.transforms._average import average as average
from kdtl_jax.transforms._average import ema as ema
from kdtl_jax.transforms._average import greedy_soup as greedy_soup
from kdtl_jax.transforms._average import interpolate as interpolate
from kdtl_jax.transforms._average import task_vector as task_vector
from kdtl_jax.transforms._average import weighted_sum as weighted_sum
from kdtl_jax.transforms._blocks import block_rows as block_rows
from kdtl_jax.transforms._codes import quantized as quantized
from kdtl_jax.transforms._codes import refuse_codes as refuse_codes
from kdtl_jax.transforms._depth import DISTILBERT_LAYERS as DISTILBERT_LAYERS
from kdtl_jax.transforms._depth import layer_map as layer_map
from kdtl_jax.transforms._depth import layer_numbers as layer_numbers
from kdtl_jax.transforms._depth import select_layers as select_layers
from kdtl_jax.transforms._depth import stack_layers as stack_layers
from kdtl_jax.transforms._depth import unstack_layers as unstack_layers
from kdtl_jax.transforms._growth import copy_with_zeros as copy_with_zeros
from kdtl_jax.transforms._growth import deepen as deepen
from kdtl_jax.transforms._growth import identity_layer as identity_layer
from kdtl_jax.transforms._growth import widen as widen
from kdtl_jax.transforms._heads import index_map as index_map
from kdtl_jax.transforms._heads import remap_units as remap_units
from kdtl_jax.transforms._heads import replace_head as replace_head
from kdtl_jax.transforms._ia3_vera_oft import RotationWeights as RotationWeights
from kdtl_jax.transforms._ia3_vera_oft import ScaleWeights as ScaleWeights
from kdtl_jax.transforms._ia3_vera_oft import VeraWeights as VeraWeights
from kdtl_jax.transforms._ia3_vera_oft import ia3_input as ia3_input
from kdtl_jax.transforms._ia3_vera_oft import ia3_output as ia3_output
from kdtl_jax.transforms._ia3_vera_oft import oft as oft
from kdtl_jax.transforms._ia3_vera_oft import vera as vera
from kdtl_jax.transforms._leaves import one_dtype as one_dtype
from kdtl_jax.transforms._lora import DoraWeights as DoraWeights
from kdtl_jax.transforms._lora import LoraWeights as LoraWeights
from kdtl_jax.transforms._lora import dora as dora
from kdtl_jax.transforms._lora import gaussian_start as gaussian_start
from kdtl_jax.transforms._lora import kaiming_start as kaiming_start
from kdtl_jax.transforms._lora import lora as lora
from kdtl_jax.transforms._lora import lora_ga_start as lora_ga_start
from kdtl_jax.transforms._lora import olora_start as olora_start
from kdtl_jax.transforms._lora import orthogonal_start as orthogonal_start
from kdtl_jax.transforms._lora import pissa_start as pissa_start
from kdtl_jax.transforms._lora import scale_by_rank as scale_by_rank
from kdtl_jax.transforms._lora import scale_by_root_rank as scale_by_root_rank
from kdtl_jax.transforms._low_rank import LowRank as LowRank
from kdtl_jax.transforms._low_rank import factor_low_rank as factor_low_rank
from kdtl_jax.transforms._low_rank import rank_for_energy as rank_for_energy
from kdtl_jax.transforms._low_rank import truncate_rank as truncate_rank
from kdtl_jax.transforms._mismatch import Policy as Policy
from kdtl_jax.transforms._mismatch import adapt_input_channels as adapt_input_channels
from kdtl_jax.transforms._mismatch import crop as crop
from kdtl_jax.transforms._mismatch import crop_or_pad as crop_or_pad
from kdtl_jax.transforms._mismatch import keep_on_mismatch as keep_on_mismatch
from kdtl_jax.transforms._mismatch import pad as pad
from kdtl_jax.transforms._mismatch import raise_on_mismatch as raise_on_mismatch
from kdtl_jax.transforms._mismatch import resize_linear as resize_linear
from kdtl_jax.transforms._mismatch import resize_patch_kernel as resize_patch_kernel
from kdtl_jax.transforms._mismatch import resize_positions as resize_positions
from kdtl_jax.transforms._mismatch import resize_positions_bicubic as resize_positions_bicubic
from kdtl_jax.transforms._mismatch import select_uniform as select_uniform
from kdtl_jax.transforms._mismatch import select_with as select_with
from kdtl_jax.transforms._plan import Plan as Plan
from kdtl_jax.transforms._plan import plan_transfer as plan_transfer
from kdtl_jax.transforms._quantize import e2m1 as e2m1
from kdtl_jax.transforms._quantize import fake_quantize as fake_quantize
from kdtl_jax.transforms._quantize import int_by_group as int_by_group
from kdtl_jax.transforms._quantize import int_per_channel as int_per_channel
from kdtl_jax.transforms._quantize import mxfp4 as mxfp4
from kdtl_jax.transforms._quantize import nvfp4 as nvfp4
from kdtl_jax.transforms._ranking import Cut as Cut
from kdtl_jax.transforms._report import Adapted as Adapted
from kdtl_jax.transforms._report import Cast as Cast
from kdtl_jax.transforms._report import Kept as Kept
from kdtl_jax.transforms._report import Report as Report
from kdtl_jax.transforms._report import collapse_paths as collapse_paths
from kdtl_jax.transforms._scale import fit_alpha as fit_alpha
from kdtl_jax.transforms._scale import scale as scale
from kdtl_jax.transforms._scale import scale_homogeneous as scale_homogeneous
from kdtl_jax.transforms._selective import Selection as Selection
from kdtl_jax.transforms._selective import arcee_fusion as arcee_fusion
from kdtl_jax.transforms._selective import arcee_piece as arcee_piece
from kdtl_jax.transforms._selective import arcee_threshold as arcee_threshold
from kdtl_jax.transforms._selective import near_swap as near_swap
from kdtl_jax.transforms._selective import ram as ram
from kdtl_jax.transforms._selective import ram_boosts as ram_boosts
from kdtl_jax.transforms._selective import ram_piece as ram_piece
from kdtl_jax.transforms._selective import sce as sce
from kdtl_jax.transforms._selective import sce_piece as sce_piece
from kdtl_jax.transforms._selective import sce_selection as sce_selection
from kdtl_jax.transforms._sparsify import breadcrumbs as breadcrumbs
from kdtl_jax.transforms._sparsify import dare as dare
from kdtl_jax.transforms._sparsify import della as della
from kdtl_jax.transforms._sparsify import della_probabilities as della_probabilities
from kdtl_jax.transforms._sparsify import keep as keep
from kdtl_jax.transforms._sparsify import l1_norms as l1_norms
from kdtl_jax.transforms._sparsify import l1_ratio as l1_ratio
from kdtl_jax.transforms._sparsify import magnitude_cut as magnitude_cut
from kdtl_jax.transforms._sparsify import mixout as mixout
from kdtl_jax.transforms._sparsify import rescale_l1 as rescale_l1
from kdtl_jax.transforms._sparsify import trim as trim
from kdtl_jax.transforms._sparsify import trim_global as trim_global
from kdtl_jax.transforms._sparsify import trim_to_cut as trim_to_cut
from kdtl_jax.transforms._spherical import Angles as Angles
from kdtl_jax.transforms._spherical import angles as angles
from kdtl_jax.transforms._spherical import karcher_mean as karcher_mean
from kdtl_jax.transforms._spherical import karcher_shares as karcher_shares
from kdtl_jax.transforms._spherical import model_stock as model_stock
from kdtl_jax.transforms._spherical import model_stock_shares as model_stock_shares
from kdtl_jax.transforms._spherical import multi_slerp as multi_slerp
from kdtl_jax.transforms._spherical import multi_slerp_shares as multi_slerp_shares
from kdtl_jax.transforms._spherical import slerp as slerp
from kdtl_jax.transforms._spherical import slerp_shares as slerp_shares
from kdtl_jax.transforms._statistics import check_grams as check_grams
from kdtl_jax.transforms._statistics import fisher_merge as fisher_merge
from kdtl_jax.transforms._statistics import regmean as regmean
from kdtl_jax.transforms._statistics import regmean_kernel as regmean_kernel
from kdtl_jax.transforms._ties import agreeing_count as agreeing_count
from kdtl_jax.transforms._ties import agreeing_weight as agreeing_weight
from kdtl_jax.transforms._ties import disjoint_merge as disjoint_merge
from kdtl_jax.transforms._ties import elect_sign as elect_sign
from kdtl_jax.transforms._ties import elect_sign_by_count as elect_sign_by_count
from kdtl_jax.transforms._ties import elect_sign_global as elect_sign_global
from kdtl_jax.transforms._ties import sign_balance as sign_balance
from kdtl_jax.transforms._ties import ties as ties
from kdtl_jax.transforms._ties import ties_per_leaf as ties_per_leaf
from kdtl_jax.transforms._ties import undivided as undivided
from kdtl_jax.transforms._transfer import apply_plan as apply_plan
from kdtl_jax.transforms._transfer import transfer as transfer
from kdtl_jax.transforms._units import first_indices as first_indices
from kdtl_jax.transforms._units import importance_by_activation as importance_by_activation
from kdtl_jax.transforms._units import importance_by_fisher as importance_by_fisher
from kdtl_jax.transforms._units import importance_by_magnitude as importance_by_magnitude
from kdtl_jax.transforms._units import importance_by_taylor as importance_by_taylor
from kdtl_jax.transforms._units import random_indices as random_indices
from kdtl_jax.transforms._units import top_indices as top_indices
from kdtl_jax.transforms._units import uniform_indices as uniform_indices
from kdtl_jax.transforms._width import Axis as Axis
from kdtl_jax.transforms._width import AxisSpec as AxisSpec
from kdtl_jax.transforms._width import axis_sizes as axis_sizes
from kdtl_jax.transforms._width import axis_spec_from_metadata as axis_spec_from_metadata
from kdtl_jax.transforms._width import pad_width as pad_width
from kdtl_jax.transforms._width import permute_units as permute_units
from kdtl_jax.transforms._width import prune_heads as prune_heads
from kdtl_jax.transforms._width import remaining_indices as remaining_indices
from kdtl_jax.transforms._width import select_width as select_width
