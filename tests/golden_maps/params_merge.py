"""Merging, adapters and layer-wise rates: mergekit's, PEFT's, WiSE-FT's, timm's, BEiT's numbers.

mergekit weighs task vectors before it elects signs and divides by agreeing weights; PEFT elects
from unweighted vectors and divides by counts. Both are compositions of the same functions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from golden_maps import Golden
from kdtl_jax import transforms
from kdtl_jax.train import finetune

Inputs = Mapping[str, Array]
Hyper = Mapping[str, Any]


def listed(x: Inputs, name: str) -> list[Array]:
    """`[x["name_0"], x["name_1"], ...]`."""
    count = sum(key.startswith(f"{name}_") for key in x)
    return [x[f"{name}_{i}"] for i in range(count)]


def deltas(x: Inputs) -> list[Array]:
    return [transforms.task_vector(model, x["base"]) for model in listed(x, "model")]


def normalized(weights: Sequence[float]) -> list[float]:
    """mergekit's `normalize`; a sum near 0 is not divided by."""
    total = sum(weights)
    return [w / total for w in weights] if abs(total) >= 1e-8 else list(weights)


def consensus(
    x: Inputs, h: Hyper, taus: Sequence[Array], elect: str | None, normalize: bool, lam: float
) -> Array:
    """mergekit's generalized task arithmetic from sparsified task vectors on."""
    weighted = [w * tau for w, tau in zip(h["weights"], taus, strict=True)]
    if elect is None:
        weights = normalized(h["weights"]) if normalize else h["weights"]
        return transforms.apply_task_vectors(x["base"], list(taus), weights, scale=lam)
    signs = {"sum": transforms.elect_sign, "count": transforms.elect_sign_by_count}[elect](weighted)
    divisor = transforms.agreeing_weight(h["weights"]) if normalize else transforms.undivided
    merged = transforms.disjoint_merge(weighted, signs, divisor=divisor)
    return transforms.apply_task_vectors(x["base"], [merged], scale=lam)


def ties(x: Inputs, h: Hyper) -> Array:
    pairs = zip(deltas(x), h["densities"], strict=True)
    taus = [transforms.trim(tau, density=density) for tau, density in pairs]
    return consensus(x, h, taus, h["consensus"], h["normalize"], h["lam"])


def dare_l1(x: Inputs, h: Hyper) -> Array:
    taus = []
    for tau, mask in zip(deltas(x), listed(x, "mask"), strict=True):
        kept = transforms.keep(tau, mask)
        taus.append(transforms.rescale_l1(kept, tau) if h["rescale"] else kept)
    return consensus(x, h, taus, h["consensus"], h["normalize"], h["lam"])


def breadcrumbs(x: Inputs, h: Hyper) -> Array:
    shares = zip(deltas(x), h["densities"], h["gammas"], strict=True)
    taus = [transforms.breadcrumbs(tau, density=d, outliers=g) for tau, d, g in shares]
    return consensus(x, h, taus, h["consensus"], False, 1.0)


def della(x: Inputs, h: Hyper) -> dict[str, Array]:
    out, taus = {}, []
    for i, tau in enumerate(deltas(x)):
        kept = transforms.keep(tau, x[f"mask_{i}"])
        taus.append(transforms.rescale_l1(kept, tau) if h["rescale"] else kept)
        out[f"keep_probability_{i}"] = transforms.della_probabilities(
            tau, density=h["densities"][i], epsilon=h["epsilon"]
        )
    return out | {"value": consensus(x, h, taus, h["consensus"], h["normalize"], 1.0)}


def peft_ties(x: Inputs, h: Hyper) -> Array:
    elect = {"total": transforms.elect_sign, "frequency": transforms.elect_sign_by_count}
    taus = [transforms.trim(tau, density=h["density"]) for tau in listed(x, "task")]
    return transforms.disjoint_merge(taus, elect[h["majority"]](taus), h["weights"])


def peft_dare(x: Inputs, h: Hyper) -> list[Array]:
    """The paper's 1 / density on a given draw; `transforms.dare` makes the draw itself."""
    pairs = zip(listed(x, "task"), listed(x, "mask"), strict=True)
    return [transforms.keep(tau, mask) / h["density"] for tau, mask in pairs]


def peft_dare_ties(x: Inputs, h: Hyper) -> Array:
    taus = peft_dare(x, h)
    return transforms.disjoint_merge(taus, transforms.elect_sign(taus), h["weights"])


def stock(x: Inputs, h: Hyper) -> Array:
    axis = -1 if h["filter_wise"] else None
    return transforms.model_stock(x["base"], listed(x, "model"), axis=axis)


def linear(x: Inputs, h: Hyper) -> Array:
    merge: Callable[..., Array] = transforms.average if h["normalize"] else transforms.weighted_sum
    return merge(listed(x, "model"), h["weights"])


def adapted_layer(
    x: Inputs, adapter: transforms.Adapter, weights: tuple[Array, ...]
) -> dict[str, Array]:
    """One linear layer `x W + b` with an adapter on its kernel."""
    merged = adapter.apply({"kernel": x["weight"], "bias": x["bias"]}, {"kernel": weights})
    out = x["x"] @ merged["kernel"] + merged["bias"][None, :]
    return {
        "value": jnp.sum(out * x["probe"]),
        "out": out,
        "merged": merged["kernel"],
        "merged_weight": merged["kernel"],
        "merged_bias": merged["bias"],
    }


def lora(x: Inputs, h: Hyper) -> dict[str, Array]:
    scaling = transforms.scale_by_root_rank if h["rank_stabilized"] else transforms.scale_by_rank
    adapter = transforms.lora(h["rank"], h["alpha"], scaling=scaling)
    weights = transforms.LoraWeights(x["lora_a"], x["lora_b"])
    nothing = {"kernel": jnp.zeros_like(x["weight"])}
    delta = adapter.apply(nothing, {"kernel": weights})["kernel"]
    return adapted_layer(x, adapter, weights) | {"delta": delta}


def dora(x: Inputs, h: Hyper) -> dict[str, Array]:
    adapter = transforms.dora(h["rank"], h["alpha"])
    if "magnitude" in x:
        magnitude = x["magnitude"]
    else:
        # A new adapter: lengths of the columns of the base plus the given first update.
        update = transforms.lora(h["rank"], h["alpha"]).apply(
            {"kernel": x["weight"]}, {"kernel": transforms.LoraWeights(x["lora_a"], x["lora_b"])}
        )
        _, fresh = adapter.init(jax.random.key(0), update, where="kernel")
        magnitude = jax.lax.stop_gradient(fresh["kernel"].magnitude)
    weights = transforms.DoraWeights(x["lora_a"], x["lora_b"], magnitude)
    return adapted_layer(x, adapter, weights) | {"initial_magnitude": magnitude}


def pissa(x: Inputs, h: Hyper) -> dict[str, Array]:
    adapter = transforms.lora(h["rank"], h["alpha"], start=transforms.pissa_start)
    base, weights = adapter.init(jax.random.key(0), {"kernel": x["weight"]}, where="kernel")
    pair = weights["kernel"]
    product = adapter.apply({"kernel": jnp.zeros_like(x["weight"])}, weights)
    return {
        "adapter_product": product["kernel"],
        "residual": base["kernel"],
        "lora_a_gram": pair.a.T @ pair.a,
        "lora_b_gram": pair.b @ pair.b.T,
    }


def ia3(x: Inputs, h: Hyper) -> dict[str, Array]:
    adapter = transforms.ia3_input() if h["feedforward"] else transforms.ia3_output()
    return adapted_layer(x, adapter, transforms.ScaleWeights(x["vector"]))


def rates(h: Hyper, *, head: str, last: str | None, min_scale: float) -> Array:
    """Multipliers of the listed names, each a leaf of its own."""
    params = {name: jnp.zeros(()) for name in h["names"]}
    ids = finetune.layer_ids(
        params,
        stem=r"(cls_token|mask_token|pos_embed|patch_embed).*",
        block=r"blocks\.(\d+)\..*",
        head=head,
        last=last,
    )
    by_name = finetune.layer_decay(ids, decay=h["decay"], min_scale=min_scale, top=h["depth"] + 1)
    return jnp.asarray([by_name[name] for name in h["names"]])


METHODS: dict[str, Golden] = {
    "lora": lora,
    "rslora": lora,
    "dora": dora,
    "pissa": pissa,
    "ia3": ia3,
    "merge_linear": linear,
    "merge_slerp": lambda x, h: transforms.slerp(
        x["base"], x["model_0"], h["t"], threshold=h["dot_threshold"]
    ),
    "task_arithmetic": lambda x, h: consensus(x, h, deltas(x), None, h["normalize"], h["lam"]),
    "ties": ties,
    "dare_l1": dare_l1,
    "breadcrumbs": breadcrumbs,
    "della": della,
    "sce": lambda x, h: transforms.sce(x["base"], listed(x, "model"), top=h["select_topk"]),
    "model_stock": stock,
    "karcher": lambda x, h: transforms.karcher_mean(
        listed(x, "model"), iterations=h["max_iter"], tolerance=h["tol"]
    ),
    # NuSLERP has no threshold on the cosine: it is linear only where the sine vanishes.
    "nuslerp": lambda x, h: transforms.slerp(
        x["model_0"], x["model_1"], h["t"], axis=None if h["flatten"] else -1, threshold=1.0
    ),
    "multislerp": lambda x, h: transforms.multi_slerp(
        x["base"],
        listed(x, "model"),
        normalized(h["weights"]) if h["normalize_weights"] else h["weights"],
    ),
    "nearswap": lambda x, h: transforms.near_swap(x["base"], x["model_0"], t=h["t"]),
    "ties_task_vectors": peft_ties,
    "dare": lambda x, h: transforms.weighted_sum(peft_dare(x, h), h["weights"]),
    "dare_ties": peft_dare_ties,
    "magnitude_prune": lambda x, h: transforms.weighted_sum(
        [transforms.trim(tau, density=h["density"]) for tau in listed(x, "task")], h["weights"]
    ),
    "wise_ft": lambda x, h: transforms.interpolate(x["base"], x["model_0"], h["alpha"]),
    "wise_ft_fisher": lambda x, h: transforms.fisher_merge(
        [x["base"], x["model_0"]],
        [x["fisher_base"], x["fisher_0"]],
        [1 - h["alpha"], h["alpha"]],
        floor=h["fisher_floor"],
    ),
    # timm's final norm shares the last block's rate, BEiT's the head's.
    "layer_decay": lambda x, h: rates(h, head="head.*", last="norm.*", min_scale=h["min_scale"]),
    "layer_decay_beit": lambda x, h: rates(h, head="(norm|head).*", last=None, min_scale=0.0),
}
