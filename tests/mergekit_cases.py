"""Tensors and merges whose numbers by mergekit are stored in data/mergekit.npz."""

from typing import Any

import numpy as np

MODELS = ("a", "b", "c")
Case = tuple[str, dict[str, Any], tuple[float, ...] | None, tuple[str, ...]]


def tensors() -> dict[str, dict[str, np.ndarray]]:
    """A base and three models: large and small changes, opposite, equal, parallel and no ones."""
    rng = np.random.default_rng(7)
    shapes = {"emb/embedding": (9, 6), "fc/kernel": (6, 8), "fc/bias": (8,), "head/kernel": (8, 3)}
    shapes |= {"norm/scale": (6,), "one": (1,), "tiny/kernel": (3, 4), "same/kernel": (4, 4)}
    base = {path: rng.normal(size=shape) * 0.05 for path, shape in shapes.items()}
    results = {"base": base}
    for number, name in enumerate(MODELS):
        size = {"norm/scale": 1.0, "tiny/kernel": 1e-5, "same/kernel": 0.0}
        results[name] = {
            path: x + rng.normal(size=x.shape) * size.get(path, 0.02) for path, x in base.items()
        }
        results[name]["head/kernel"] = base["head/kernel"] * (1 + 0.1 * number)
        results[name]["fc/bias"] = base["fc/bias"] + (-1) ** number * np.linspace(0.01, 0.02, 8)
    return {n: {p: x.astype(np.float32) for p, x in one.items()} for n, one in results.items()}


def has_base(case: str) -> bool:
    """Whether the base model takes part."""
    without = ("linear", "karcher", "passthrough", "slerp", "nuslerp", "multislerp")
    return case.split()[0] not in without or case.endswith("of changes")


W = (1.0, 0.4, 0.7)
HALF = {"density": 0.5}
CASES: dict[str, Case] = {
    "linear": ("linear", {}, W, MODELS),
    "linear sum": ("linear", {"normalize": False}, W, MODELS),
    "slerp": ("slerp", {"t": 0.3}, None, ("a", "b")),
    "nuslerp": ("nuslerp", {}, (1.0, 0.5), ("a", "b")),
    "nuslerp rows": ("nuslerp", {"nuslerp_flatten": False}, (1.0, 0.5), ("a", "b")),
    "multislerp": ("multislerp", {}, W, MODELS),
    "nuslerp of changes": ("nuslerp", {}, (1.0, 0.5), ("a", "b")),
    "multislerp of changes": ("multislerp", {}, W, MODELS),
    "karcher": ("karcher", {}, None, MODELS),
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.8}, W, MODELS),
    "task_arithmetic mean": ("task_arithmetic", {"normalize": True}, W, MODELS),
    "ties": ("ties", HALF, W, MODELS),
    "ties sum": ("ties", {**HALF, "normalize": False, "lambda": 1.3}, W, MODELS),
    "ties whole": ("ties", {}, W, MODELS),
    "ties negative": ("ties", HALF, (1.0, -0.5, 0.7), MODELS),
    "ties sparse": ("ties", {"density": 0.01}, W, MODELS),
    "ties rescaled": ("ties", {**HALF, "rescale": True}, W, MODELS),
    "dare_linear": ("dare_linear", HALF, W, MODELS),
    "dare_linear plain": ("dare_linear", {**HALF, "rescale": False}, W, MODELS),
    "dare_ties": ("dare_ties", HALF, W, MODELS),
    "dare_ties mean": ("dare_ties", {**HALF, "normalize": True}, W, MODELS),
    "della": ("della", {**HALF, "epsilon": 0.2}, W, MODELS),
    "della_linear": ("della_linear", HALF, W, MODELS),
    "breadcrumbs": ("breadcrumbs", {**HALF, "gamma": 0.2}, W, MODELS),
    "breadcrumbs few": ("breadcrumbs", {"density": 0.9, "gamma": 0.3}, W, MODELS),
    "breadcrumbs_ties": ("breadcrumbs_ties", {**HALF, "gamma": 0.2}, W, MODELS),
    "sce": ("sce", {}, None, MODELS),
    "sce some": ("sce", {"select_topk": 0.4}, None, MODELS),
    "model_stock": ("model_stock", {}, None, MODELS),
    "model_stock rows": ("model_stock", {"filter_wise": True}, None, MODELS),
    "passthrough": ("passthrough", {"scale": 0.7}, None, ("a",)),
    "nearswap": ("nearswap", {"t": 0.01}, None, ("a",)),
    "arcee_fusion": ("arcee_fusion", {}, None, ("a",)),
    "ram": ("ram", {}, None, MODELS),
    "ramplus_tl": ("ramplus_tl", {"r": 0.3}, None, MODELS),
}
