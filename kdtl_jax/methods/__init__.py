"""Published methods as values, for any two model functions.

    setup = methods.setup(student, teacher, student_variables=..., teacher_variables=..., ...)
    method = methods.review(setup)
    step = train.make_step(student, method.terms, method.weights, tx, teacher=teacher)

A loss is an equation; a method is a paper: which losses on which outputs, with which weights,
connectors and memory. Each function here is one method, and its docstring gives the equation, the
weights and their source. Hyper-parameters are keyword arguments; to override a weight, pass
`{**method.weights, "kd": 0.5}` to the step. Every method takes the same setup and raises ValueError
with the reason, "needs ...", if the pair of models lacks something that the method reads. `table()`
lists them all.
"""

from kdtl_jax.methods._classes import adaptive_kl as adaptive_kl
from kdtl_jax.methods._classes import forward_kl as forward_kl
from kdtl_jax.methods._classes import hard_kd as hard_kd
from kdtl_jax.methods._classes import js as js
from kdtl_jax.methods._classes import jsd_continuous as jsd_continuous
from kdtl_jax.methods._classes import jsd_gkd as jsd_gkd
from kdtl_jax.methods._classes import jsd_normalized as jsd_normalized
from kdtl_jax.methods._classes import label_smoothing as label_smoothing
from kdtl_jax.methods._classes import mft as mft
from kdtl_jax.methods._classes import probability_shift as probability_shift
from kdtl_jax.methods._classes import reverse_kl as reverse_kl
from kdtl_jax.methods._classes import skew_forward_kl as skew_forward_kl
from kdtl_jax.methods._classes import skew_reverse_kl as skew_reverse_kl
from kdtl_jax.methods._classes import symmetric_kl as symmetric_kl
from kdtl_jax.methods._classes import tf_kd as tf_kd
from kdtl_jax.methods._classes import total_variation as total_variation
from kdtl_jax.methods._classes import uskd as uskd
from kdtl_jax.methods._features import ab as ab
from kdtl_jax.methods._features import cosine as cosine
from kdtl_jax.methods._features import fsp as fsp
from kdtl_jax.methods._features import ft as ft
from kdtl_jax.methods._features import hint as hint
from kdtl_jax.methods._features import ickd as ickd
from kdtl_jax.methods._features import mgd as mgd
from kdtl_jax.methods._features import ofd as ofd
from kdtl_jax.methods._features import pkd as pkd
from kdtl_jax.methods._features import review as review
from kdtl_jax.methods._features import ridge_hint as ridge_hint
from kdtl_jax.methods._features import srd as srd
from kdtl_jax.methods._features import vid as vid
from kdtl_jax.methods._heads import at as at
from kdtl_jax.methods._heads import catkd as catkd
from kdtl_jax.methods._heads import cwd as cwd
from kdtl_jax.methods._heads import jacobian as jacobian
from kdtl_jax.methods._heads import nst as nst
from kdtl_jax.methods._heads import simkd as simkd
from kdtl_jax.methods._heads import srrl as srrl
from kdtl_jax.methods._heads import wkd_f as wkd_f
from kdtl_jax.methods._logits import binary_kd as binary_kd
from kdtl_jax.methods._logits import bounded_regression as bounded_regression
from kdtl_jax.methods._logits import ctkd as ctkd
from kdtl_jax.methods._logits import dist as dist
from kdtl_jax.methods._logits import dkd as dkd
from kdtl_jax.methods._logits import hinge_ranking as hinge_ranking
from kdtl_jax.methods._logits import kd as kd
from kdtl_jax.methods._logits import logistic_ranking as logistic_ranking
from kdtl_jax.methods._logits import logit_huber as logit_huber
from kdtl_jax.methods._logits import logit_l1 as logit_l1
from kdtl_jax.methods._logits import logit_mse as logit_mse
from kdtl_jax.methods._logits import logit_std as logit_std
from kdtl_jax.methods._logits import mlld as mlld
from kdtl_jax.methods._logits import nkd as nkd
from kdtl_jax.methods._logits import ttm as ttm
from kdtl_jax.methods._logits import wkd_l as wkd_l
from kdtl_jax.methods._logits import wsld as wsld
from kdtl_jax.methods._logits import wttm as wttm
from kdtl_jax.methods._method import Method as Method
from kdtl_jax.methods._method import Predict as Predict
from kdtl_jax.methods._method import alone as alone
from kdtl_jax.methods._method import method as method
from kdtl_jax.methods._method import no_connectors as no_connectors
from kdtl_jax.methods._method import no_memory as no_memory
from kdtl_jax.methods._relations import cc as cc
from kdtl_jax.methods._relations import crd as crd
from kdtl_jax.methods._relations import dcd as dcd
from kdtl_jax.methods._relations import info_nce as info_nce
from kdtl_jax.methods._relations import itrd as itrd
from kdtl_jax.methods._relations import pkt as pkt
from kdtl_jax.methods._relations import rkd as rkd
from kdtl_jax.methods._relations import rrd as rrd
from kdtl_jax.methods._relations import sp as sp
from kdtl_jax.methods._setup import Head as Head
from kdtl_jax.methods._setup import Layout as Layout
from kdtl_jax.methods._setup import Models as Models
from kdtl_jax.methods._setup import Setup as Setup
from kdtl_jax.methods._setup import layout as layout
from kdtl_jax.methods._setup import linear_head as linear_head
from kdtl_jax.methods._setup import multi_label as multi_label
from kdtl_jax.methods._setup import regression as regression
from kdtl_jax.methods._setup import setup as setup
from kdtl_jax.methods._table import Entry as Entry
from kdtl_jax.methods._table import table as table
from kdtl_jax.methods._table import takes_temperature as takes_temperature
from kdtl_jax.methods._tokens import attention_kl as attention_kl
from kdtl_jax.methods._tokens import attention_mse as attention_mse
from kdtl_jax.methods._tokens import hidden_cosine as hidden_cosine
from kdtl_jax.methods._tokens import hidden_mse as hidden_mse
from kdtl_jax.methods._tokens import minilm as minilm
from kdtl_jax.methods._tokens import minilm_v2 as minilm_v2
from kdtl_jax.methods._tokens import patient_kd as patient_kd
from kdtl_jax.methods._tokens import tinybert as tinybert
