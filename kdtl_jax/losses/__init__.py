"""Distillation losses: `(student, teacher, *, hyperparameters) -> one value per example`.

Student first. No loss reduces, weights, mixes, holds parameters or stops a gradient; the objective
and the step do. Task losses are optax's.
"""

from kdtl_jax.losses._attention import attention_kl as attention_kl
from kdtl_jax.losses._attention import attention_mse as attention_mse
from kdtl_jax.losses._attention import minilm_relation as minilm_relation
from kdtl_jax.losses._attention import minilm_v2 as minilm_v2
from kdtl_jax.losses._attention import tinybert_attention as tinybert_attention
from kdtl_jax.losses._attention import tinybert_hidden as tinybert_hidden
from kdtl_jax.losses._attention import uniform_layers as uniform_layers
from kdtl_jax.losses._attention_maps import attention_map as attention_map
from kdtl_jax.losses._attention_maps import attention_transfer as attention_transfer
from kdtl_jax.losses._attention_maps import attention_transfer_paper as attention_transfer_paper
from kdtl_jax.losses._attention_maps import catkd as catkd
from kdtl_jax.losses._attention_maps import factor_transfer as factor_transfer
from kdtl_jax.losses._boundaries import activation_boundary as activation_boundary
from kdtl_jax.losses._boundaries import ofd as ofd
from kdtl_jax.losses._boundaries import ofd_margin as ofd_margin
from kdtl_jax.losses._boundaries import partial_l2 as partial_l2
from kdtl_jax.losses._channels import affinity as affinity
from kdtl_jax.losses._channels import cwd as cwd
from kdtl_jax.losses._channels import flow_matrix as flow_matrix
from kdtl_jax.losses._channels import fsp as fsp
from kdtl_jax.losses._channels import ickd as ickd
from kdtl_jax.losses._channels import nst as nst
from kdtl_jax.losses._channels import pkd_pearson as pkd_pearson
from kdtl_jax.losses._contrast import crd as crd
from kdtl_jax.losses._contrast import dcd_invariance as dcd_invariance
from kdtl_jax.losses._contrast import info_nce as info_nce
from kdtl_jax.losses._contrast import rrd as rrd
from kdtl_jax.losses._correlations import ega_edge as ega_edge
from kdtl_jax.losses._correlations import ega_node as ega_node
from kdtl_jax.losses._correlations import feature_correlation as feature_correlation
from kdtl_jax.losses._correlations import itrd_mutual as itrd_mutual
from kdtl_jax.losses._divergences import forward_kl as forward_kl
from kdtl_jax.losses._divergences import reverse_kl as reverse_kl
from kdtl_jax.losses._hints import hint as hint
from kdtl_jax.losses._hints import hint_cosine as hint_cosine
from kdtl_jax.losses._hints import mgd as mgd
from kdtl_jax.losses._hints import ridge_hint as ridge_hint
from kdtl_jax.losses._hints import simkd as simkd
from kdtl_jax.losses._hints import srd as srd
from kdtl_jax.losses._hints import srrl as srrl
from kdtl_jax.losses._hints import vid as vid
from kdtl_jax.losses._jacobians import jacobian_matching as jacobian_matching
from kdtl_jax.losses._jacobians import jacobian_matching_exact as jacobian_matching_exact
from kdtl_jax.losses._logits import kd_kl as kd_kl
from kdtl_jax.losses._logits import logit_mse as logit_mse
from kdtl_jax.losses._relations import cc as cc
from kdtl_jax.losses._relations import gaussian_taylor_kernel as gaussian_taylor_kernel
from kdtl_jax.losses._relations import pkt as pkt
from kdtl_jax.losses._relations import rkd_angle as rkd_angle
from kdtl_jax.losses._relations import rkd_distance as rkd_distance
from kdtl_jax.losses._relations import sp as sp
from kdtl_jax.losses._singular import kdsvd as kdsvd
from kdtl_jax.losses._spatial import hcl as hcl
from kdtl_jax.losses._spatial import wkd_feature as wkd_feature
from kdtl_jax.losses._tokens import hidden_cosine as hidden_cosine
from kdtl_jax.losses._tokens import hidden_mse as hidden_mse
from kdtl_jax.losses._tokens import patient_kd as patient_kd
from kdtl_jax.losses._tokens import token_gram as token_gram
