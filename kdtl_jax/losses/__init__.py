"""Distillation losses: `(student, teacher, *, hyperparameters) -> one value per example`.

The student comes first. No loss reduces, weights, mixes, holds parameters or stops a gradient; the
objective and the step do. For task losses, use optax; published methods, which combine losses, are
in `kdtl_jax.methods`. The losses are listed first, followed by the pieces that go into them:
targets, weights, schedules and alignments.

Results are float32 or wider. Everywhere, arrays that are not real floating point, masks that are
not bool, and labels, ids or counts that are not integers raise TypeError; shapes that do not fit,
and hyper-parameters, concrete labels and ids out of their range raise ValueError. Losses of empty
arrays raise ValueError too, except those of sampled tokens, where a text may have none.
"""

from kdtl_jax.losses._attention import attention_kl as attention_kl
from kdtl_jax.losses._attention import attention_mse as attention_mse
from kdtl_jax.losses._attention import minilm_relation as minilm_relation
from kdtl_jax.losses._attention import minilm_v2 as minilm_v2
from kdtl_jax.losses._attention import token_gram as token_gram
from kdtl_jax.losses._channels import affinity as affinity
from kdtl_jax.losses._channels import cwd as cwd
from kdtl_jax.losses._channels import fsp as fsp
from kdtl_jax.losses._channels import ickd as ickd
from kdtl_jax.losses._channels import kdsvd as kdsvd
from kdtl_jax.losses._channels import nst as nst
from kdtl_jax.losses._contrast import bi_tuning_classifier as bi_tuning_classifier
from kdtl_jax.losses._contrast import bi_tuning_projection as bi_tuning_projection
from kdtl_jax.losses._contrast import crd as crd
from kdtl_jax.losses._contrast import dcd_invariance as dcd_invariance
from kdtl_jax.losses._contrast import info_nce as info_nce
from kdtl_jax.losses._contrast import rrd as rrd
from kdtl_jax.losses._contrast import uniform_contrast as uniform_contrast
from kdtl_jax.losses._correlations import ega_edge as ega_edge
from kdtl_jax.losses._correlations import ega_node as ega_node
from kdtl_jax.losses._correlations import itrd_mutual as itrd_mutual
from kdtl_jax.losses._correlations import pkd_pearson as pkd_pearson
from kdtl_jax.losses._correlations import ridge_hint as ridge_hint
from kdtl_jax.losses._divergences import binary_kl as binary_kl
from kdtl_jax.losses._divergences import forward_kl as forward_kl
from kdtl_jax.losses._divergences import hard_kd as hard_kd
from kdtl_jax.losses._divergences import kd_kl as kd_kl
from kdtl_jax.losses._divergences import reverse_kl as reverse_kl
from kdtl_jax.losses._divergences import skew_forward_kl as skew_forward_kl
from kdtl_jax.losses._divergences import skew_reverse_kl as skew_reverse_kl
from kdtl_jax.losses._divergences import soft_cross_entropy as soft_cross_entropy
from kdtl_jax.losses._divergences import symmetric_kl as symmetric_kl
from kdtl_jax.losses._divergences import total_variation as total_variation
from kdtl_jax.losses._divergences import ttm as ttm
from kdtl_jax.losses._divergences import wttm as wttm
from kdtl_jax.losses._draft import lk_alpha as lk_alpha
from kdtl_jax.losses._draft import lk_lambda as lk_lambda
from kdtl_jax.losses._draws import random_sampling_cross_entropy as random_sampling_cross_entropy
from kdtl_jax.losses._features import activation_boundary as activation_boundary
from kdtl_jax.losses._features import cosine_distance as cosine_distance
from kdtl_jax.losses._features import huber as huber
from kdtl_jax.losses._features import last_axis_mse as last_axis_mse
from kdtl_jax.losses._features import mae as mae
from kdtl_jax.losses._features import margin_mse as margin_mse
from kdtl_jax.losses._features import mse as mse
from kdtl_jax.losses._features import partial_l2 as partial_l2
from kdtl_jax.losses._features import squared_distance as squared_distance
from kdtl_jax.losses._features import srd as srd
from kdtl_jax.losses._features import teacher_bounded as teacher_bounded
from kdtl_jax.losses._features import vid as vid
from kdtl_jax.losses._jensen_shannon import jensen_shannon as jensen_shannon
from kdtl_jax.losses._jensen_shannon import jsd_continuous as jsd_continuous
from kdtl_jax.losses._jensen_shannon import jsd_gkd as jsd_gkd
from kdtl_jax.losses._jensen_shannon import jsd_normalized as jsd_normalized
from kdtl_jax.losses._labels import nckd as nckd
from kdtl_jax.losses._labels import target_cross_entropy as target_cross_entropy
from kdtl_jax.losses._labels import tckd as tckd
from kdtl_jax.losses._maps import attention_transfer as attention_transfer
from kdtl_jax.losses._maps import attention_transfer_paper as attention_transfer_paper
from kdtl_jax.losses._maps import catkd as catkd
from kdtl_jax.losses._maps import factor_transfer as factor_transfer
from kdtl_jax.losses._maps import hcl as hcl
from kdtl_jax.losses._maps import wkd_feature as wkd_feature
from kdtl_jax.losses._on_policy import entropy_aware_kl as entropy_aware_kl
from kdtl_jax.losses._on_policy import student_top_k_reverse_kl as student_top_k_reverse_kl
from kdtl_jax.losses._on_policy import (
    top_k_reverse_kl_sampled_tail as top_k_reverse_kl_sampled_tail,
)
from kdtl_jax.losses._predictions import batch_correlation as batch_correlation
from kdtl_jax.losses._predictions import class_correlation as class_correlation
from kdtl_jax.losses._predictions import dist_inter as dist_inter
from kdtl_jax.losses._predictions import dist_intra as dist_intra
from kdtl_jax.losses._predictions import skd_direction as skd_direction
from kdtl_jax.losses._relations import cc as cc
from kdtl_jax.losses._relations import pkt as pkt
from kdtl_jax.losses._relations import rkd_angle as rkd_angle
from kdtl_jax.losses._relations import rkd_distance as rkd_distance
from kdtl_jax.losses._relations import sp as sp
from kdtl_jax.losses._sampled import clipped_policy_gradient as clipped_policy_gradient
from kdtl_jax.losses._sampled import kl_k2 as kl_k2
from kdtl_jax.losses._sampled import kl_k3 as kl_k3
from kdtl_jax.losses._sampled import policy_gradient as policy_gradient
from kdtl_jax.losses._sampled import sampled_reverse_kl as sampled_reverse_kl
from kdtl_jax.losses._topk import hinge_ranking as hinge_ranking
from kdtl_jax.losses._topk import logistic_ranking as logistic_ranking
from kdtl_jax.losses._topk import top_k_kl_renormalized as top_k_kl_renormalized
from kdtl_jax.losses._topk import top_k_kl_sampled as top_k_kl_sampled
from kdtl_jax.losses._topk import top_k_kl_tail as top_k_kl_tail
from kdtl_jax.losses._topk import top_k_kl_teacher_renormalized as top_k_kl_teacher_renormalized
from kdtl_jax.losses._topk import top_k_kl_truncated as top_k_kl_truncated
from kdtl_jax.losses._transfer import afn as afn
from kdtl_jax.losses._transfer import co_tuning as co_tuning
from kdtl_jax.losses._transfer import delta as delta
from kdtl_jax.losses._transfer import jacobian_matching as jacobian_matching
from kdtl_jax.losses._transfer import jacobian_matching_exact as jacobian_matching_exact
from kdtl_jax.losses._transport import sinkhorn_cost as sinkhorn_cost
from kdtl_jax.losses._transport import sorted_l1 as sorted_l1
from kdtl_jax.losses._transport import uld as uld
from kdtl_jax.losses._transport import uld_w1 as uld_w1
from kdtl_jax.losses._vocabularies import alm as alm
from kdtl_jax.losses._vocabularies import alm_limit as alm_limit

# isort: split
# Pieces.
from kdtl_jax.losses._attention import uniform_layers as uniform_layers
from kdtl_jax.losses._channels import flow_matrix as flow_matrix
from kdtl_jax.losses._chunked import chunked_divergence as chunked_divergence
from kdtl_jax.losses._chunked import chunked_loss as chunked_loss
from kdtl_jax.losses._chunked import chunked_map as chunked_map
from kdtl_jax.losses._contrast import unit_classes as unit_classes
from kdtl_jax.losses._contrast import unit_features as unit_features
from kdtl_jax.losses._correlations import feature_correlation as feature_correlation
from kdtl_jax.losses._divergences import adaptive_kl_weight as adaptive_kl_weight
from kdtl_jax.losses._draft import acceptance as acceptance
from kdtl_jax.losses._draft import draft_targets as draft_targets
from kdtl_jax.losses._draft import known_to_draft as known_to_draft
from kdtl_jax.losses._draws import WeightedClasses as WeightedClasses
from kdtl_jax.losses._draws import random_sampling_draws as random_sampling_draws
from kdtl_jax.losses._draws import random_sampling_targets as random_sampling_targets
from kdtl_jax.losses._features import ofd_margin as ofd_margin
from kdtl_jax.losses._head import Head as Head
from kdtl_jax.losses._head import head_logits as head_logits
from kdtl_jax.losses._labels import mft_teacher as mft_teacher
from kdtl_jax.losses._labels import non_target_logits as non_target_logits
from kdtl_jax.losses._labels import probability_shift as probability_shift
from kdtl_jax.losses._labels import uskd_weight as uskd_weight
from kdtl_jax.losses._labels import virtual_teacher as virtual_teacher
from kdtl_jax.losses._labels import wsld_weight as wsld_weight
from kdtl_jax.losses._labels import zipf_targets as zipf_targets
from kdtl_jax.losses._maps import attention_map as attention_map
from kdtl_jax.losses._on_policy import in_student_top_k as in_student_top_k
from kdtl_jax.losses._on_policy import top_k_overlap as top_k_overlap
from kdtl_jax.losses._predictions import standardize_logits as standardize_logits
from kdtl_jax.losses._relations import gaussian_taylor_kernel as gaussian_taylor_kernel
from kdtl_jax.losses._sampled import drop_gate as drop_gate
from kdtl_jax.losses._sampled import iw_opd_weight as iw_opd_weight
from kdtl_jax.losses._sampled import ratio_gate as ratio_gate
from kdtl_jax.losses._sampled import reward_to_go as reward_to_go
from kdtl_jax.losses._sampled import truncated_ratio as truncated_ratio
from kdtl_jax.losses._sampled import whitened as whitened
from kdtl_jax.losses._sequence import Shifted as Shifted
from kdtl_jax.losses._sequence import TaidProgress as TaidProgress
from kdtl_jax.losses._sequence import answers_first as answers_first
from kdtl_jax.losses._sequence import causal_shift as causal_shift
from kdtl_jax.losses._sequence import distillm2_alpha as distillm2_alpha
from kdtl_jax.losses._sequence import taid_advance as taid_advance
from kdtl_jax.losses._sequence import taid_start as taid_start
from kdtl_jax.losses._sequence import taid_teacher as taid_teacher
from kdtl_jax.losses._sequence import token_log_probs as token_log_probs
from kdtl_jax.losses._topk import TopK as TopK
from kdtl_jax.losses._topk import soften_top_k as soften_top_k
from kdtl_jax.losses._topk import stored_top_k as stored_top_k
from kdtl_jax.losses._topk import top_k_at as top_k_at
from kdtl_jax.losses._topk import top_k_buckets as top_k_buckets
from kdtl_jax.losses._topk import top_k_targets as top_k_targets
from kdtl_jax.losses._transfer import delta_attention as delta_attention
from kdtl_jax.losses._transfer import feature_norms as feature_norms
from kdtl_jax.losses._vocabularies import by_id as by_id
from kdtl_jax.losses._vocabularies import log_mass as log_mass
from kdtl_jax.losses._vocabularies import shared_vocabulary as shared_vocabulary
from kdtl_jax.losses._vocabularies import without_padding as without_padding
