"""The table of methods by name, which `kdtl distill --list` prints."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from kdtl_jax.methods import (
    _classes,
    _features,
    _heads,
    _logits,
    _relations,
    _tokens,
)
from kdtl_jax.methods._method import Method
from kdtl_jax.methods._setup import Setup


class Entry(NamedTuple):
    """A published method by name."""

    name: str
    title: str
    paper: str  # authors, arXiv id or venue, year
    needs: str  # "labels" | "logits" | "features" | "maps" | "tokens" | "networks"
    connector: bool  # trains a connector along with the student
    build: Callable[..., Method]  # of a `Setup`; keyword arguments are hyper-parameters
    applies: Callable[[Setup], str | None]  # None, or the reason why not


def _entries(
    needs: str, *rows: tuple[Callable[..., Method], str, str], connector: bool = False
) -> Iterator[Entry]:
    for build, title, paper in rows:
        yield Entry(build.__name__, title, paper, needs, connector, build, partial(_refusal, build))


def _refusal(build: Callable[..., Method], setup: Setup) -> str | None:
    """The reason why a method refuses a setup, or None.

    With default hyper-parameters, the reason can only be the models.
    """
    try:
        build(setup)
    except ValueError as reason:
        return str(reason)
    return None


def takes_temperature(entry: Entry) -> bool:
    """Whether `entry.build` has `temperature=`."""
    return "temperature" in inspect.signature(entry.build).parameters


def table() -> tuple[Entry, ...]:
    """Every published method, by family."""
    return _TABLE


_TABLE = (
    *_entries(
        "logits",
        (_logits.kd, "Knowledge distillation", "Hinton, Vinyals, Dean, 1503.02531, 2015"),
        (_logits.logit_std, "KD of standardized logits", "Sun et al., 2403.01427, 2024"),
        (_logits.dkd, "Decoupled KD", "Zhao et al., 2203.08679, 2022"),
        (_logits.nkd, "Normalized KD", "Yang et al., 2303.13005, 2023"),
        (_logits.dist, "DIST: relations of classes and examples", "Huang et al., 2205.10536, 2022"),
        (_logits.wsld, "Weighted soft labels", "Zhou et al., 2102.00650, 2021"),
        (_logits.ttm, "Transformed teacher matching", "Zheng, Yang, 2402.11148, 2024"),
        (_logits.wttm, "Weighted transformed teacher matching", "Zheng, Yang, 2402.11148, 2024"),
        (_logits.logit_mse, "Regression on logits", "Ba, Caruana, 1312.6184, 2014"),
        (_logits.logit_l1, "L1 regression on outputs", "He et al., ICIP 2020"),
        (_logits.logit_huber, "Huber regression on outputs (smooth L1)", "Huber, 1964"),
        (_logits.bounded_regression, "Teacher-bounded regression", "Chen et al., NeurIPS 2017"),
        (_logits.mlld, "Multi-level logit distillation", "Jin, Wang, Lin, CVPR 2023"),
        (_logits.wkd_l, "Wasserstein KD of logits", "Lv, Yang, Li, 2412.08139, 2024"),
        (_logits.binary_kd, "KD of sigmoid heads", "Yang et al., 2308.06453, 2023"),
        (_logits.hinge_ranking, "Hinge ranking, teacher's order", "DistillKit, 2024"),
        (_logits.logistic_ranking, "Logistic ranking, teacher's order", "Burges et al., ICML 2005"),
        (_classes.forward_kl, "Forward KL", "Kullback, Leibler, 1951"),
        (_classes.reverse_kl, "Reverse KL (MiniLLM)", "Gu et al., 2306.08543, 2023"),
        (_classes.symmetric_kl, "Symmetric KL (Jeffreys)", "Jeffreys, 1946"),
        (_classes.js, "Jensen-Shannon divergence", "Lin, 1991"),
        (_classes.jsd_gkd, "GKD's JSD, beta .1", "Agarwal et al., 2306.13649, 2023"),
        (_classes.jsd_continuous, "Continuous JSD, beta .1", "Agarwal et al., 2306.13649, 2023"),
        (_classes.jsd_normalized, "Normalized JSD, beta .1", "Huszár, 1511.05101, 2015"),
        (_classes.skew_forward_kl, "Skew forward KL (DistiLLM)", "Ko et al., 2402.03898, 2024"),
        (_classes.skew_reverse_kl, "Skew reverse KL (DistiLLM)", "Ko et al., 2402.03898, 2024"),
        (_classes.total_variation, "Total variation distance", "Wen et al., 2307.15190, 2023"),
        (_classes.adaptive_kl, "Adaptive KL (AKL)", "Wu et al., 2404.02657, 2024"),
        (_classes.probability_shift, "KD with errors swapped", "Wen et al., 1911.07471, 2019"),
        (_classes.mft, "Minifinetuning", "Belcak et al., 2506.15702, 2025"),
        (_classes.hard_kd, "The teacher's decisions (DeiT)", "Touvron et al., 2012.12877, 2021"),
    ),
    *_entries(
        "logits",
        (_logits.ctkd, "KD, temperature learned adversarially", "Li et al., 2211.16231, 2022"),
        connector=True,
    ),
    *_entries(
        "labels",
        (_classes.label_smoothing, "Label smoothing", "Szegedy et al., 1512.00567, 2015"),
        (_classes.tf_kd, "Teacher-free KD", "Yuan et al., 1909.11723, 2019"),
    ),
    *_entries(
        "features",
        (_features.hint, "FitNets hint of the middle layer", "Romero et al., 1412.6550, 2015"),
        (_classes.uskd, "Universal self-KD", "Yang et al., 2303.13005, 2023"),
        (_features.cosine, "Cosine hint of every layer", "Sanh et al., 1910.01108, 2019"),
        (_features.vid, "Variational information", "Ahn et al., 1904.05835, 2019"),
        (_features.ickd, "Inter-channel correlation", "Liu et al., ICCV 2021"),
        (_features.pkd, "Pearson correlation of features", "Cao et al., 2207.02039, 2022"),
        (_features.mgd, "Masked generative distillation", "Yang et al., 2205.01529, 2022"),
        (_features.srd, "Log-sum distance plus KD", "Miles, Mikolajczyk, 2303.11098, 2023"),
        (_features.review, "Knowledge review (ReviewKD)", "Chen et al., 2104.09044, 2021"),
        (_features.ft, "Factor transfer", "Kim, Park, Kwak, 1802.04977, 2018"),
        (_features.ab, "Activation boundaries, before the labels", "Heo et al., 1811.03233, 2019"),
        (_features.ofd, "Overhaul of feature distillation", "Heo et al., 1904.01866, 2019"),
        (_features.fsp, "Flow of solution procedure, before the labels", "Yim et al., CVPR 2017"),
        (_heads.simkd, "The teacher's classifier reused", "Chen et al., 2203.14001, 2022"),
        (_heads.srrl, "Softmax regression representations", "Yang et al., ICLR 2021"),
        (_relations.itrd, "Information-theoretic (ITRD)", "Miles et al., 2112.00459, 2022"),
        (_relations.crd, "Contrastive (CRD)", "Tian et al., 1910.10699, 2020"),
        (_relations.info_nce, "Contrast within the batch", "van den Oord et al., 1807.03748, 2018"),
        (_relations.dcd, "Contrast, consistency (DCD)", "Giakoumoglou et al., 2407.11802, 2024"),
        (_relations.rrd, "Contrast with a queue (RRD)", "Giakoumoglou et al., 2407.12073, 2024"),
        connector=True,
    ),
    *_entries(
        "features",
        (_features.ridge_hint, "Closed-form ridge hint", "Golub, Pereyra, 2003"),
        (_relations.sp, "Similarity-preserving KD", "Tung, Mori, 1907.09682, 2019"),
        (_relations.rkd, "Relational KD, distances and angles", "Park et al., 1904.05068, 2019"),
        (_relations.pkt, "Probabilistic knowledge transfer", "Passalis, Tefas, 1803.10837, 2018"),
        (_relations.cc, "Correlation congruence", "Peng et al., 1904.01802, 2019"),
    ),
    *_entries(
        "maps",
        (_heads.catkd, "Class attention transfer (CAT-KD)", "Guo et al., CVPR 2023"),
        (_heads.at, "Attention transfer", "Zagoruyko, Komodakis, 1612.03928, 2017"),
        (_heads.nst, "Neuron selectivity transfer", "Huang, Wang, 1707.01219, 2017"),
    ),
    *_entries(
        "maps",
        (_heads.cwd, "Channel-wise distillation", "Shu et al., 2011.13256, 2021"),
        (_heads.wkd_f, "Wasserstein KD of features", "Lv, Yang, Li, 2412.08139, 2024"),
        connector=True,
    ),
    *_entries(
        "networks",
        (_heads.jacobian, "Jacobian matching", "Srinivas, Fleuret, 1803.00443, 2018"),
    ),
    *_entries(
        "tokens",
        (_tokens.hidden_mse, "Hidden states of every layer", "Jiao et al., 1909.10351, 2019"),
        (_tokens.hidden_cosine, "Directions of hidden states", "Sanh et al., 1910.01108, 2019"),
        (_tokens.patient_kd, "First token of every layer (PKD)", "Sun et al., 1908.09355, 2019"),
        (_tokens.tinybert, "TinyBERT", "Jiao et al., 1909.10351, 2019"),
        connector=True,
    ),
    *_entries(
        "tokens",
        (_tokens.attention_kl, "Attention of every layer", "Wang et al., 2002.10957, 2020"),
        (_tokens.attention_mse, "Attention scores, every layer", "Jiao et al., 1909.10351, 2019"),
        (_tokens.minilm, "MiniLM", "Wang et al., 2002.10957, 2020"),
        (_tokens.minilm_v2, "MiniLMv2", "Wang et al., 2012.15828, 2021"),
    ),
)
