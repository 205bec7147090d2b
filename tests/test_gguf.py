"""GGUF files: what llama.cpp's converter changes is changed back; bad files are refused."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf as writing
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import losses, models
from kdtl_jax.interop import _hf_decoders, decoders, gguf, naming

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
GEMMA: dict[str, Any] = {
    **LLAMA,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LLAMA", LLAMA),
    # The fourth layer does not rotate.
    "smollm3": ("SMOLLM3", {**LLAMA, "model_type": "smollm3", "num_hidden_layers": 4}),
    "gemma": (
        "GEMMA",
        {k: v for k, v in GEMMA.items() if k not in ("query_pre_attn_scalar", "sliding_window")}
        | {"model_type": "gemma"},
    ),
    "qwen2": ("QWEN2", {**LLAMA, "model_type": "qwen2"}),
    "qwen3": ("QWEN3", {**LLAMA, "model_type": "qwen3", "head_dim": 16}),
    "gemma2": (
        "GEMMA2",
        {
            **GEMMA,
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": ("GEMMA3", {**GEMMA, "model_type": "gemma3_text", "rope_theta": 1e6}),
    "phi3": (
        "PHI3",
        {**LLAMA, "model_type": "phi3", "original_max_position_embeddings": 128},
    ),
    "olmo2": ("OLMO2", {**LLAMA, "model_type": "olmo2"}),
    "gpt2": (
        "GPT2",
        {
            "model_type": "gpt2",
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "n_inner": 64,
            "layer_norm_epsilon": 1e-5,
        },
    ),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 9)), jnp.int32)


def _permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute`, as its converter has it."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _converted(name: str, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """The converter's changes to a tensor of a Hugging Face folder."""
    family = config["model_type"]
    rotates = family in ("llama", "smollm3")
    if rotates and "q_proj" in name:
        return _permuted(array, config["num_attention_heads"])
    if rotates and "k_proj" in name:
        return _permuted(array, config["num_key_value_heads"])
    if family.startswith("gemma") and name.endswith("norm.weight"):
        return array + 1
    if family == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return np.ascontiguousarray(array.T)
    return array


def _source(config: dict[str, Any]) -> tuple[Any, dict[str, np.ndarray]]:
    """A random model of the config, and its tensors under Hugging Face names."""
    built, rules = _hf_decoders.decoder(config)
    model = models.decoder(built)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(
        lambda x: 0.3 * jax.random.normal(next(keys), x.shape),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    prefix = _hf_decoders.FAMILIES[config["model_type"]].prefix
    tensors = {
        name if name.startswith("lm_head") else prefix + name: np.asarray(array)
        for name, array in naming.to_torch(params, rules).items()
    }
    return decoders.from_tensors(config, tensors), tensors


def _write(
    path: Path,
    architecture: str,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    change: Callable[[Any], None] = lambda writer: None,
) -> Path:
    def get(key: str, gpt2: str, default: Any = None) -> Any:
        return config.get(key, config.get(gpt2, default))

    arch = getattr(writing.MODEL_ARCH, architecture)
    writer = writing.GGUFWriter(path, writing.MODEL_ARCH_NAMES[arch])
    layers = get("num_hidden_layers", "n_layer")
    writer.add_block_count(layers)
    writer.add_context_length(get("max_position_embeddings", "n_positions"))
    writer.add_embedding_length(get("hidden_size", "n_embd"))
    writer.add_feed_forward_length(get("intermediate_size", "n_inner"))
    writer.add_head_count(get("num_attention_heads", "n_head"))
    if architecture == "GPT2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    if "attn_logit_softcapping" in config:
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{i}" for i in range(64)])
    writer.add_token_types([1] * 64)
    writer.add_token_merges(["t 0", "t 1"])
    writer.add_eos_token_id(2)
    change(writer)
    names = writing.get_tensor_name_map(arch, layers)
    for name, array in tensors.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        writer.add_tensor(theirs, _converted(name, array, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_computes_the_same(case: str, tmp_path: Path) -> None:
    architecture, config = CASES[case]
    source, tensors = _source(config)
    path = _write(tmp_path / "model.gguf", architecture, config, tensors)
    read = gguf.load(path)
    expected, got = (
        losses.head_logits(m.model.apply(m.params, TOKENS)[0], m.model.head(m.params))
        for m in (source, read)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    # The configuration is one of config.json: a folder is written and read again.
    decoders.save(tmp_path / "folder", read.params, read.rules, config=read.config)
    again = decoders.load(tmp_path / "folder")
    assert again.model.config == read.model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, read.params)


def test_stored_divisors_of_the_frequencies_are_applied(tmp_path: Path) -> None:
    divisors = np.asarray([1.0, 2.0, 4.0, 8.0], np.float32)
    _, tensors = _source(LLAMA)
    path = _write(
        tmp_path / "model.gguf",
        "LLAMA",
        LLAMA,
        tensors,
        lambda writer: writer.add_tensor("rope_freqs.weight", divisors),
    )
    plain = np.asarray(_hf_decoders.decoder(LLAMA)[0].ropes[0].frequencies)
    rope = gguf.load(path).model.config.ropes[0]
    np.testing.assert_allclose(rope.frequencies, plain / divisors, rtol=1e-6)
    assert rope.scale == 1.0


def test_quantized_tensors_become_floats_of_the_wanted_type(tmp_path: Path) -> None:
    _, tensors = _source(LLAMA)
    table = tensors.pop("model.embed_tokens.weight")
    kind = writing.GGMLQuantizationType.Q8_0
    packed = writing.quants.quantize(table, kind)
    path = _write(
        tmp_path / "model.gguf",
        "LLAMA",
        LLAMA,
        tensors,
        lambda writer: writer.add_tensor("token_embd.weight", packed, raw_dtype=kind),
    )
    read = gguf.load(path, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(read.params)} == {jnp.dtype(jnp.bfloat16)}
    got = np.asarray(read.params["tokens"]["embedding"], np.float32)
    unpacked = jnp.asarray(writing.quants.dequantize(packed, kind)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, np.asarray(unpacked, np.float32))


def test_the_tokenizer_is_handed_over(tmp_path: Path) -> None:
    _, tensors = _source(LLAMA)
    path = _write(tmp_path / "model.gguf", "LLAMA", LLAMA, tensors)
    words = gguf.tokenizer(path)
    assert (words.model, words.pre, words.bos, words.eos) == ("gpt2", "smollm", None, 2)
    assert words.tokens[:2] == ("t0", "t1") and words.merges == ("t 0", "t 1")
    assert words.types == (1,) * 64 and words.chat_template is None


def test_what_is_not_understood_is_refused(tmp_path: Path) -> None:
    _, tensors = _source(LLAMA)

    def written(**changes: Any) -> Path:
        def change(writer: Any) -> None:
            for key, value in changes.items():
                writer.add_uint32(key.replace("__", "."), value)

        return _write(tmp_path / "model.gguf", "LLAMA", LLAMA, tensors, change)

    with pytest.raises(ValueError, match="not understood here: expert_count"):
        gguf.load(written(llama__expert_count=4))
    with pytest.raises(ValueError, match="rotation of 4 of 8 channels"):
        gguf.load(written(llama__rope__dimension_count=4))
    whole = written().read_bytes()
    for broken in (b"", b"GGUF", b"not a model at all, but long enough to be read", whole[:300]):
        (tmp_path / "broken.gguf").write_bytes(broken)
        with pytest.raises(ValueError, match="cannot be read as GGUF"):
            gguf.load(tmp_path / "broken.gguf")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        gguf.load(tmp_path / "absent.gguf")
    path = _write(
        tmp_path / "more.gguf",
        "LLAMA",
        LLAMA,
        tensors,
        lambda writer: writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((4, 4), "f")),
    )
    with pytest.raises(ValueError, match="'blk.0.ffn_gate_exps.weight' of a 'llama' file"):
        gguf.load(path)


def _changed(folder: Path, case: str, **changes: Any) -> Path:
    """A file of the case with hyperparameters of other values (`__` for a dot), None leaves out."""
    kinds = writing.GGUFValueType
    architecture, config = CASES[case]

    def change(writer: Any) -> None:
        for name, value in changes.items():
            key = f"{writer.arch}.{name.replace('__', '.')}"
            writer.kv_data[0].pop(key, None)
            if value is not None:
                kind = kinds.INT32 if isinstance(value, int) else kinds.get_type(value)
                entries = kinds.INT32 if kind == kinds.ARRAY else None
                writer.add_key_value(key, value, kind, entries)

    return _write(folder / "model.gguf", architecture, config, _tensors(case), change)


@cache
def _tensors(case: str) -> dict[str, np.ndarray]:
    return _source(CASES[case][1])[1]


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("qwen2", {"attention__sliding_window": 64}, "window of 64 positions, below its 128"),
        ("llama", {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0,
                   "rope__scaling__attn_factor": 0.5}, "= 0.5 beside rope scaling 'linear'"),
        ("llama", {"rope__scaling__attn_factor": 0.5}, "= 0.5 beside rope scaling 'none'"),
        ("llama", {"rope__scaling__type": "yarn"}, "rope scaling 'yarn' of GGUF files"),
        ("llama", {"attention__head_count": 3}, "32 rows, which are not those of 3 heads"),
        ("llama", {"attention__head_count": None}, "attention.head_count must be a positive whole"),
        ("llama", {"rope__freq_base": -1.0}, "rope_theta must be above 0"),
    ],
)  # fmt: skip
def test_what_would_be_computed_otherwise_is_refused(
    case: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        gguf.load(_changed(tmp_path, case, **changes))


def test_windows_that_change_nothing_are_left_out(tmp_path: Path) -> None:
    assert gguf.load(_changed(tmp_path, "qwen2", attention__sliding_window=128)).model.config
    none = gguf.load(_changed(tmp_path, "phi3", attention__sliding_window=0))  # Phi-4's
    assert not any(none.model.config.windows)


@pytest.mark.parametrize("value", [0, -1, 2**31 - 1, "text", [1, 2], float("nan"), True])
def test_hostile_hyperparameters_end_in_a_clear_error(value: Any, tmp_path: Path) -> None:
    for key in (
        "block_count context_length embedding_length feed_forward_length attention__head_count "
        "attention__head_count_kv attention__layer_norm_rms_epsilon attention__key_length "
        "attention__value_length rope__freq_base rope__dimension_count rope__scaling__type "
        "rope__scaling__factor rope__scaling__attn_factor"
    ).split():
        changes = {"rope__scaling__type": "linear", key: value}
        try:
            gguf.load(_changed(tmp_path, "llama", **changes))
        except ValueError as error:
            message = str(error)
            by_leaf = message.startswith("source and target do not match.")
            assert by_leaf or (len(message.splitlines()) == 1 and len(message) < 500), (
                key,
                message,
            )
            unclear = "zip|reshape|math domain|broadcast|unsupported operand"
            assert not re.search(unclear, message), (key, message)


def test_factors_of_the_frequencies_come_in_pairs_and_fit(tmp_path: Path) -> None:
    def written(**tensors: Any) -> Path:
        def change(writer: Any) -> None:
            for name, values in tensors.items():
                writer.add_tensor(f"{name}.weight", np.asarray(values, np.float32))

        return _write(tmp_path / "model.gguf", *CASES["phi3"], _tensors("phi3"), change)

    ones, twos = [1.0] * 4, [2.0] * 4
    both = gguf.load(written(rope_factors_long=twos, rope_factors_short=ones))
    rope = both.model.config.ropes[0]
    assert rope.long_frequencies is not None
    np.testing.assert_allclose(np.divide(rope.frequencies, rope.long_frequencies), 2)
    for alone in ("rope_factors_long", "rope_factors_short"):
        with pytest.raises(ValueError, match=f"rope_factors_short, got {alone}"):
            gguf.load(written(**{alone: ones}))
    for odd in ([1.0] * 3, [1.0, 0.0, 1.0, 1.0], [float("nan")] * 4):
        with pytest.raises(ValueError, match="short_factor must be 4 positive numbers"):
            gguf.load(written(rope_factors_long=twos, rope_factors_short=odd))
