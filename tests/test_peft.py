"""PEFT adapters: the weights that PEFT 0.21.2 merges, and what is refused by name.

`peft.npz` holds, for a tiny network (embedding, Conv2d, Linear, Conv1D), adapters as PEFT saved
them and the tensors of `merge_and_unload`.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdtl_jax import transforms
from kdtl_jax.cli import main
from kdtl_jax.interop import peft, safetensors

STORED = dict(np.load(Path(__file__).with_name("peft.npz")))
CASES = sorted({name.partition("|")[0] for name in STORED} - {"base"})


def part(case: str, kind: str = "") -> dict[str, np.ndarray]:
    start = f"{case}|{kind}|" if kind else f"{case}|"
    return {k.removeprefix(start): v for k, v in STORED.items() if k.startswith(start)}


BASE = part("base")


def config(case: str) -> dict[str, Any]:
    return json.loads(str(STORED[f"{case}|config"]))


def write(folder: Path, tensors: Any, settings: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.save(folder / peft.WEIGHTS, tensors)
    (folder / peft.CONFIG).write_text(json.dumps(settings))
    return folder


def merged(folder: Path, case: str) -> dict[str, Any]:
    got = peft.merge(BASE, peft.load(folder))
    for name, want in part(case, "merged").items():
        np.testing.assert_allclose(got[name], want, rtol=1e-6, atol=3e-7, err_msg=name)
    return got


@pytest.mark.parametrize("case", CASES)
def test_adapters_are_merged_and_saved_as_peft_does(tmp_path: Path, case: str) -> None:
    folder = write(tmp_path / "a", part(case, "adapter"), config(case))
    got = merged(folder, case)
    untouched = [name for name in BASE if name not in part(case, "merged")]
    assert all(got[name] is BASE[name] for name in untouched)
    peft.save(tmp_path / "copy", peft.load(folder))
    merged(tmp_path / "copy", case)


def test_the_command_merges_what_python_merges(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", part("rslora_bias", "adapter"), config("rslora_bias"))
    safetensors.save(tmp_path / "base.safetensors", BASE)
    out = str(tmp_path / "out.safetensors")
    words = ["lora-merge", str(tmp_path / "base.safetensors"), str(folder), "--write", out]
    assert main(["params", *words]) == 0
    want = peft.merge(BASE, peft.load(folder))
    for name, array in safetensors.load(out).items():
        np.testing.assert_array_equal(array, want[name], err_msg=name)
    assert main(["params", *words, "--force", "--alpha", "3"]) == 2


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_weights_for_transforms_and_back(tmp_path: Path, case: str) -> None:
    folder = write(tmp_path / "a", part(case, "adapter"), config(case))
    weights = peft.to_lora(peft.load(folder))
    make = transforms.dora if case == "dora" else transforms.lora
    kind = make(alpha=1.0, scaling=lambda alpha, rank: 1.0, in_axis=-1, out_axis=-2)
    kernels = {name: jnp.asarray(BASE[name]) for name in weights}
    want = part(case, "merged")
    for name, kernel in kind.merge(kernels, weights).items():
        np.testing.assert_allclose(kernel, want[name], rtol=1e-6, atol=3e-7)
    # Alpha equal to the rank is the scale 1; ranks differ, so each module has its own alpha.
    alphas = {n.removesuffix(".weight"): w.a.shape[-1] for n, w in weights.items()}
    back = peft.from_lora(weights, alpha=1.0, alpha_pattern=alphas, target_modules=["q", "k"])
    peft.save(tmp_path / "copy", back)
    merged(tmp_path / "copy", case)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
    "pissa by steps": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    "olora": ({"init_lora_weights": "olora"}, "olora"),
    "corda": ({"init_lora_weights": "corda", "corda_config": {"x": 1}}, "corda"),
    "loftq": ({"init_lora_weights": "loftq"}, "loftq"),
    "lora-ga": ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    "alora": ({"alora_invocation_tokens": [7, 8]}, "alora_invocation_tokens"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["w"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "future": ({"use_something_new": True}, "use_something_new"),
    "a number that is off elsewhere": ({"sparsity": 0}, "sparsity"),
    "kind": ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
    "rank": ({"r": 7, "rank_pattern": {}}, "of rank"),
    "pattern": ({"alpha_pattern": {"q": "x"}}, "alpha_pattern"),
    "pattern without end": ({"rank_pattern": {"(a+)+b": 2}}, "rank_pattern"),
    "alpha": ({"lora_alpha": "many"}, "lora_alpha"),
    "dora without lengths": ({"use_dora": True}, "without lora_magnitude_vector"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_configuration_says_is_understood_or_refused(tmp_path: Path, name: str) -> None:
    changes, says = REFUSED[name]
    folder = write(tmp_path / "a", part("lora", "adapter"), config("lora") | changes)
    with pytest.raises(ValueError, match=says) as error:
        peft.merge(BASE, peft.load(folder))
    assert "merge_and_unload" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_model.model.q.lora_B.bias": (4,)}, "q' with .*lora_B.bias"),
        ({"base_model.model.q.lora_magnitude_vector": (4,)}, "lora_magnitude_vector"),
        ({"base_model.model.q.lora_C.weight": (4,)}, "lora_C"),
        ({"base_model.model.score.weight": (3, 4)}, "score.weight"),
        ({"base_model.model.q.bias": (4,)}, "q.bias"),
        ({"base_model.model.embed.token_adapter.trainable_tokens_delta": (1, 6)}, "token_adapter"),
        (
            {
                f"base_model.model.k.lora_{p}.{a}.weight": (3, 6) if p == "A" else (6, 3)
                for p in "AB"
                for a in ("one", "two")
            },
            "adapters .'one', 'two'",
        ),
    ],
)
def test_tensors_are_understood_or_refused(tmp_path: Path, changes: Any, says: str) -> None:
    extra = {name: np.ones(shape, np.float32) for name, shape in changes.items()}
    folder = write(tmp_path / "a", part("lora", "adapter") | extra, config("lora"))
    with pytest.raises(ValueError, match=says):
        peft.load(folder)


def test_adapters_of_another_architecture(tmp_path: Path) -> None:
    result = peft.load(write(tmp_path / "a", part("lora", "adapter"), config("lora")))
    with pytest.raises(ValueError, match="'q.weight' is not in the base; nearest"):
        peft.merge({name: x for name, x in BASE.items() if name != "q.weight"}, result)
    with pytest.raises(ValueError, match="does not fit"):
        peft.merge(BASE | {"q.weight": np.ones((5, 6), np.float32)}, result)


def test_square_kernels_are_told_by_the_bases_configuration(tmp_path: Path) -> None:
    """One flag, the last module's, says nothing of the others: GPT-2's Conv1D is [in, out]."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 4), (4, 2)))
    kernel = np.zeros((4, 4), np.float32)
    for flag in (False, True):
        tensors = {
            f"base_model.model.h.0.{m}.lora_{p}.weight": x
            for m in ("c_proj", "query")
            for p, x in (("A", a), ("B", b))
        }
        adapter_config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": flag}
        result = peft.load(write(tmp_path / str(flag), tensors, adapter_config))
        base = {"h.0.c_proj.weight": kernel, "h.0.query.weight": kernel}
        got = peft.merge(base, result, {"model_type": "gpt2"})
        np.testing.assert_allclose(got["h.0.c_proj.weight"], (b @ a).T, rtol=1e-6)
        np.testing.assert_allclose(got["h.0.query.weight"], b @ a, rtol=1e-6)
        with pytest.raises(ValueError, match="fan_in_fan_out of"):
            peft.merge(base, result)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.dictionaries(
        st.sampled_from([*config("lora"), "x", ""]),
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats(allow_nan=False)
        | st.text(max_size=4)
        | st.lists(st.integers(), max_size=2)
        | st.dictionaries(
            st.text(max_size=3), st.integers(-3, 3) | st.text(max_size=2), max_size=2
        ),
        max_size=3,
    )
)
def test_any_configuration_is_merged_or_refused(tmp_path: Path, changes: Any) -> None:
    start = time.process_time()
    folder = write(tmp_path / "a", part("lora", "adapter"), config("lora") | changes)
    try:
        peft.merge(BASE, peft.load(folder))
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 500
    assert time.process_time() - start < 2


def test_the_dora_of_a_table_normalizes_its_columns(tmp_path: Path) -> None:
    """PEFT's DoraEmbeddingVariant: `m / ||column|| (W + s A^T B^T)`; it was merged as a LoRA."""
    rng = np.random.default_rng(0)
    table, a, b = (rng.normal(size=s).astype("f4") for s in ((7, 4), (2, 7), (4, 2)))
    magnitude = np.abs(rng.normal(size=(4, 1))).astype("f4")
    name = "base_model.model.emb.lora_"
    tensors = {
        f"{name}embedding_A": a,
        f"{name}embedding_B": b,
        f"{name}magnitude_vector": magnitude,
    }
    says = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_dora": True}
    actual = peft.load(write(tmp_path / "a", tensors, says))
    whole = table + 3 * (b @ a).T
    want = magnitude.ravel() / np.linalg.norm(whole, axis=0) * whole
    np.testing.assert_allclose(peft.merge({"emb.weight": table}, actual)["emb.weight"], want, 1e-5)


@pytest.mark.parametrize("shape", [(3, 3, 3, 3), (5, 1)])
def test_scales_of_convolutions_and_of_one_number_are_refused(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """They were multiplied onto the last axis, and onto the bias of the other side."""
    vector = np.ones((1, shape[1], *(1 for _ in shape[2:])), "f4")
    folder = write(tmp_path / "a", {"base_model.model.c.ia3_l": vector}, {"peft_type": "IA3"})
    with pytest.raises(ValueError, match="does not say which side it scales"):
        peft.merge({"c.weight": np.ones(shape, "f4")}, peft.load(folder))


@pytest.mark.parametrize("kind", ["modules_to_save", "lora"])
def test_an_embedding_that_is_the_output_layer_too_is_not_adapted_alone(
    tmp_path: Path, kind: str
) -> None:
    """PEFT leaves the tied head as it was, in a tensor that a tied base does not store."""
    table = np.ones((5, 4), np.float32)
    start, says = "base_model.model.model.embed_tokens", {"peft_type": "LORA", "r": 2}
    if kind == "lora":
        ab = {"A": np.ones((2, 5), "f4"), "B": np.ones((4, 2), "f4")}
        tensors = {f"{start}.lora_embedding_{p}": x for p, x in ab.items()}
    else:
        tensors, says = {f"{start}.weight": table + 1}, says | {"modules_to_save": ["embed_tokens"]}
    actual = peft.load(write(tmp_path / "a", tensors, says))
    base = {"model.embed_tokens.weight": table}
    of = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    with pytest.raises(ValueError, match="the base's output layer is the same tensor"):
        peft.merge(base, actual, of)
    for config in (
        of | {"tie_word_embeddings": False},
        of | {"architectures": ["BertForSequenceClassification"]},
    ):
        assert (peft.merge(base, actual, config)["model.embed_tokens.weight"] != table).all()
    whole = peft.merge(base | {"lm_head.weight": table}, actual, of)
    assert whole["lm_head.weight"] is table
