"""Decoders that classify texts or tokens: what the class reads, and the way back to its folder.

The logits were recorded from transformers 5.24 (torch 2.13): the decoders of tests/data/decoders as
the base of its classes, with `score` or `classifier` drawn as in `folder`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import edited, retensored

from kdtl_jax.interop import classifiers, decoders, safetensors

FOLDERS = Path(__file__).parent / "data" / "decoders"
TOKENS = np.array([[3, 7, 11, 5, 9, 2], [8, 4, 6, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
MASK = TOKENS > 0
QWEN3_TEXTS = [[-2.0609, 1.6464, -5.9411], [-0.2078, -0.0353, 4.2125], [-5.1797, -2.0337, 6.5706]]
GPT2_TEXTS = [[6.3533, 2.6075, -3.9931], [-2.6047, 0.0293, -2.8115], [6.7518, 0.8731, 0.1387]]
# Of the real tokens: six of the first text, three of the second, one of the third.
GPT2_TOKENS = [
    [5.3878, 2.2734, 0.432],
    [5.4925, 5.6564, -0.5897],
    [4.0579, 2.4192, -0.9455],
    [4.6463, 4.6353, -0.5286],
    [7.5232, 2.341, 0.068],
    [8.1549, 3.9226, -3.6358],
    [8.5491, 4.4665, -4.4423],
    [4.182, 4.4352, -4.0491],
    [-0.803, 1.3444, -2.4541],
    [8.5534, 2.1882, 0.4961],
]


def folder(to: Path, name: str, task: str, **changes: Any) -> Path:
    """A decoder of tests/data with a classifier of 3 classes for its head."""
    stem = {"gpt2": "GPT2", "qwen3": "Qwen3"}[name]
    changes = {"pad_token_id": 0, "id2label": {str(i): f"c{i}" for i in range(3)}} | changes
    changes = {"architectures": [f"{stem}For{task}Classification"], **changes}
    rng = np.random.default_rng(0)
    head = "classifier" if (name, task) == ("gpt2", "Token") else "score"

    def classifying(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        norm = next(x for k, x in tensors.items() if k.endswith(("norm.weight", "ln_f.weight")))
        score = {f"{head}.weight": rng.normal(size=(3, norm.shape[0])).astype(np.float32)}
        if task == "Token":
            score[f"{head}.bias"] = rng.normal(size=3).astype(np.float32)
        return {k: x for k, x in tensors.items() if k != "lm_head.weight"} | score

    return retensored(edited(FOLDERS / name, to, **changes), classifying)


def logits(source: classifiers.Classifier, tokens: Any = TOKENS, mask: Any = MASK) -> np.ndarray:
    inputs = {"tokens": jnp.asarray(tokens, jnp.int32)}
    inputs |= {} if mask is None else {"mask": jnp.asarray(mask)}
    run = jax.jit(lambda params, inputs: source.model(params, None, inputs)[0]["logits"])
    return np.asarray(run(source.params, inputs))


@pytest.mark.parametrize(
    ("name", "task", "wanted"),
    [
        ("qwen3", "Sequence", QWEN3_TEXTS),
        ("gpt2", "Sequence", GPT2_TEXTS),
        ("gpt2", "Token", GPT2_TOKENS),
    ],
)
def test_a_classifier_is_that_of_transformers_and_comes_back(
    name: str, task: str, wanted: Any, tmp_path: Path
) -> None:
    source = classifiers.load(folder(tmp_path, name, task))
    actual = logits(source)
    real = MASK if task == "Token" else np.ones(3, bool)
    np.testing.assert_allclose(actual[real], wanted, atol=2e-4)
    assert source.report.fraction == 1 and "score/kernel" in source.report.copied
    if task == "Sequence":
        # A mask is not needed on the right, and padding on the left changes no text.
        np.testing.assert_allclose(logits(source, mask=None), actual, atol=1e-5)
        left = np.stack([np.concatenate([row[row == 0], row[row > 0]]) for row in TOKENS])
        np.testing.assert_allclose(logits(source, left, left > 0), actual, atol=1e-5)
    classifiers.save(tmp_path / "out", source.params, source.rules, config=source.config)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == source.config["architectures"]
    assert config["id2label"] == source.config["id2label"]
    before, after = (safetensors.load(at) for at in (tmp_path / name, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_shallower_classifier_keeps_the_head(tmp_path: Path) -> None:
    source = classifiers.load(folder(tmp_path, "qwen3", "Sequence", pad_token_id=None))
    small = classifiers.student(source, layers=[0])
    classifiers.save(tmp_path / "out", small.params, small.rules, config=small.config)
    again = classifiers.load(tmp_path / "out", dtype=jnp.bfloat16)
    assert again.decoder.model.config.layers == 1
    np.testing.assert_array_equal(small.params["score"]["kernel"], source.params["score"]["kernel"])
    assert {leaf.dtype for leaf in jax.tree.leaves(again.params)} == {jnp.bfloat16.dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] is None


def test_other_heads_and_shapes_are_refused(tmp_path: Path) -> None:
    known = folder(tmp_path, "qwen3", "Sequence")
    with pytest.raises(ValueError, match=r"'score.weight': .*classifiers.load reads"):
        decoders.load(known)
    for at, (changes, why) in enumerate(
        (
            ({"architectures": ["Qwen3ForQuestionAnswering"]}, "expected one class named"),
            ({"architectures": None}, "decoders.load reads language models"),
            ({"pad_token_id": "0"}, "pad_token_id = 0; expected an integer or null"),
        )
    ):
        with pytest.raises(ValueError, match=why):
            classifiers.load(edited(known, tmp_path / str(at), **changes))
    for change, why in (
        (lambda x: {k: v for k, v in x.items() if k != "score.weight"}, "has neither score.weight"),
        (lambda x: x | {"score.weight": np.ones((3, 5), np.float32)}, "score/kernel"),
        (lambda x: x | {"classifier.weight": x["score.weight"]}, "score/kernel"),
    ):
        to = tmp_path / "changed"
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(known, to)
        with pytest.raises(ValueError, match=why):
            classifiers.load(retensored(to, change))
