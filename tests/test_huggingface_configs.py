"""config.json: every key read, harmless or refused; and derived from what is written."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import edited

from kdtl_jax.interop import huggingface, naming, safetensors

FOLDERS = Path(__file__).parent / "data" / "huggingface"
TOKENS = jnp.arange(3, 9, dtype=jnp.int32)[None]


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def saved(tmp_path: Path, source: huggingface.Pretrained, **changes: Any) -> Path:
    out = tmp_path / "out"
    config = {**source.config, **changes}
    huggingface.save(out, source.params, source.rules, config=config)
    return out


SIZES = {
    "bert": ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"],
    "distilbert": ["dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings"],
    "vit": ["image_size", "patch_size", "num_channels", "pooler_output_size"],
    "resnet_basic": ["embedding_size", "hidden_sizes", "depths"],
}
NUMBERS = {
    "bert": ["layer_norm_eps", "hidden_dropout_prob", "classifier_dropout"],
}
HOSTILE = [0, -1, 10**9, 10**400, 1.5, True, "8", float("nan"), {}, [[1]], [10**9]]


@pytest.mark.parametrize(("family", "key"), [(f, k) for f, keys in SIZES.items() for k in keys])
def test_hostile_sizes_are_one_clear_error(tmp_path: Path, family: str, key: str):
    source = edited(FOLDERS / family, tmp_path)
    config = written(source)
    for value in HOSTILE:
        (source / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=rf"config.json: {key} = ") as error:
            huggingface.load(source)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(("family", "key"), [(f, k) for f, keys in NUMBERS.items() for k in keys])
def test_hostile_numbers_are_one_clear_error(tmp_path: Path, family: str, key: str):
    source = edited(FOLDERS / family, tmp_path)
    config = written(source)
    for value in [-1e-6, 2.0, float("nan"), float("inf"), 10**400, True, "x", [1], {"a": 1}]:
        (source / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=rf"config.json: {key} = .*; expected a number"):
            huggingface.load(source)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("bert", {"rotary": True}, "not known to be harmless: 'rotary' = True"),
        ("bert", {"auto_map": {"AutoModel": "x.Y"}}, "'auto_map'"),
        ("bert", {"pruned_heads": {"0": [1]}}, "'pruned_heads'"),
        (
            "vit",
            {"pooler_act": "mish"},
            "pooler_act = 'mish'; the activation 'mish' is not supported",
        ),
        ("vit", {"image_size": [8]}, "image_size = .*expected a positive integer, or two"),
        ("vit", {"image_size": 3}, r"image_size \[3, 3\] is smaller than patch_size"),
        ("vit", {"image_size": 9}, r"positions: source\[1, 17, 12\] does not fit"),
        ("resnet_basic", {"depths": [1]}, "must have one entry per stage each"),
        ("resnet_basic", {"layer_type": "wide"}, "layer_type = 'wide'"),
        ("bert", {"architectures": "BertModel"}, "architectures = BertModel; expected names"),
        ("bert", {"num_attention_heads": 5}, "num_attention_heads = 5 does not divide the width"),
        ("mpnet_language", {"relative_attention_num_buckets": 8}, "only 32"),
        ("t5", {"relative_attention_num_buckets": 3}, "num_buckets = 3; expected .* at least 4"),
        ("t5", {"relative_attention_max_distance": 1}, "a largest distance above a quarter"),
        ("bert", {"is_decoder": True}, "outputs would be wrong"),
    ],
)
def test_what_changes_outputs_and_is_not_built_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], says: str
):
    with pytest.raises(ValueError, match=f"(?s){says}"):
        huggingface.load(edited(FOLDERS / family, tmp_path, **changes))


def test_harmless_keys_and_empty_values_pass(tmp_path: Path):
    more = {"temperature": 0.7, "finetuning_task": "sst2", "pruned_heads": {}, "future": None}
    more |= {"tie_weights_": True, "sbert_ce_default_activation_function": "x.Identity"}
    more |= {"sentence_transformers": {"activation_fn": "x.Identity"}, "unsloth_fixed": True}
    source = huggingface.load(
        edited(FOLDERS / "bert", tmp_path, gradient_checkpointing=True, **more)
    )
    assert source.module == huggingface.load(FOLDERS / "bert").module


def test_missing_keys_mean_what_transformers_takes_them_for(tmp_path: Path):
    assert huggingface.load(
        edited(FOLDERS / "roberta", tmp_path, layer_norm_eps=...)
    ).module.norm_epsilon == (1e-12)


@pytest.mark.parametrize(
    ("family", "key", "output"),
    [
        ("bert", "classifier_dropout", "logits"),
        ("bert", "hidden_dropout_prob", "last_hidden"),
        ("bert", "attention_probs_dropout_prob", "last_hidden"),
        ("roberta_classifier", "classifier_dropout", "logits"),
        ("roberta_tokens", "classifier_dropout", "logits"),
        ("distilbert", "seq_classif_dropout", "logits"),
        ("distilbert_tokens", "dropout", "logits"),
        ("vit", "attention_probs_dropout_prob", "last_hidden"),
        ("vit", "hidden_dropout_prob", "last_hidden"),
        ("dinov2_classifier", "drop_path_rate", "last_hidden"),
        ("convnext", "drop_path_rate", "last_hidden"),
    ],
)
def test_every_dropout_of_the_config_drops_in_training(
    tmp_path: Path, family: str, key: str, output: str
):
    rates = dict.fromkeys(
        (k for k in json.loads((FOLDERS / family / "config.json").read_text()) if "drop" in k), 0.0
    )
    rates = {k: v for k, v in rates.items() if "summary" not in k}
    source = huggingface.load(edited(FOLDERS / family, tmp_path, **rates | {key: 0.9}))
    sides = {"vit": 16, "convnext": 16, "dinov2_classifier": 8}
    side = sides.get(family)
    inputs = TOKENS if side is None else jnp.ones((1, side, side, 3))

    @jax.jit
    def both(params: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        plain, _ = source.model(params, None, inputs)
        dropped, _ = source.model(params, None, inputs, key=key, train=True)
        return plain[output], dropped[output]

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        plain, dropped = both(source.params, jax.random.key(0))
    assert not np.allclose(plain, dropped, atol=1e-6)


def test_a_head_is_told_by_its_name_or_by_its_tensors(tmp_path: Path):
    bert = huggingface.load(edited(FOLDERS / "bert", tmp_path, architectures=...))
    assert bert.module.classes is not None and bert.module.token_classes is None
    # Without a pooler below it, the same tensors classify tokens.
    folder = tmp_path / "bert"
    tensors = {k: np.array(x) for k, x in safetensors.load(folder).items() if "pooler" not in k}
    safetensors.save(folder / "model.safetensors", tensors)
    source = huggingface.load(folder)
    assert source.module.classes is None and source.module.token_classes == bert.module.classes
    logits = jax.eval_shape(source.model, source.params, None, TOKENS)[0]["logits"]
    assert logits.shape == (1, 6, bert.module.classes)
    for name in ("roberta_tokens", "distilbert_tokens", "electra_classifier", "mpnet_language"):
        want = huggingface.load(FOLDERS / name)
        named = huggingface.load(edited(FOLDERS / name, tmp_path, architectures=None))
        assert named.module == want.module and not named.report.extra


def test_a_pooler_below_a_head_that_does_not_read_it_is_reported(tmp_path: Path):
    folder = edited(FOLDERS / "bert", tmp_path, architectures=["BertForTokenClassification"])
    source = huggingface.load(folder)
    assert source.report.extra == ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
    assert source.module.token_classes is not None and not source.module.has_pooler


def test_a_language_head_with_an_output_layer_of_its_own_is_refused(tmp_path: Path):
    folder = edited(FOLDERS / "bert_language", tmp_path, tie_word_embeddings=False)
    left_out = huggingface.load(folder)  # transformers would draw the output layer at random
    assert not left_out.module.has_language_head and len(left_out.report.extra) == 5
    tensors = {k: np.array(x) for k, x in safetensors.load(folder).items()}
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    safetensors.save(folder / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="BertForMaskedLM is not tied to the embedding"):
        huggingface.load(folder)


def test_layers_labels_sizes_and_dtype_are_those_of_the_tensors(tmp_path: Path):
    source = huggingface.load(FOLDERS / "modernbert_language")
    small = huggingface.student(source, layers=(0,))
    assert written(saved(tmp_path, small))["layer_types"] == ["full_attention"]
    # The same from a config that was not told, where the entries do not differ.
    params = {k: v for k, v in source.params.items() if k != "layers_1"}
    alike = {"layer_types": ["full_attention"] * 2}
    out = saved(tmp_path, source._replace(params=params), **alike)
    assert written(out)["num_hidden_layers"] == len(written(out)["layer_types"]) == 1
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), source.params)
    assert written(saved(tmp_path, source._replace(params=half)))["dtype"] == "bfloat16"
    bert = huggingface.load(FOLDERS / "bert")
    head = {"kernel": jnp.zeros((12, 7)), "bias": jnp.zeros(7)}
    grown = saved(tmp_path, bert._replace(params={**bert.params, "head": head}))
    assert len(written(grown)["id2label"]) == 7 and huggingface.load(grown).module.classes == 7
    bare = {k: v for k, v in bert.params.items() if k != "head"}
    assert written(saved(tmp_path, bert._replace(params=bare)))["architectures"] == ["BertModel"]


def test_described_knows_which_side_is_which():
    config = json.loads((FOLDERS / "distilbert" / "config.json").read_text())
    tensors = {k: np.array(x) for k, x in safetensors.load(FOLDERS / "distilbert").items()}
    tensors = {k: x for k, x in tensors.items() if "layer.1." not in k}
    words, lin1 = "distilbert.embeddings.word_embeddings.weight", "ffn.lin1."
    tensors[words] = tensors[words][:20]
    tensors |= {k: x[:10].astype(np.float16) for k, x in tensors.items() if lin1 in k}
    with pytest.raises(ValueError, match=r"layers_0/mlp/down/kernel: source\[20, 12\]"):
        huggingface.described(config, tensors)
    tensors |= {k: x[:, :10] for k, x in tensors.items() if k.endswith("ffn.lin2.weight")}
    new = huggingface.described(config, tensors)
    assert {k: new[k] for k in ("vocab_size", "n_layers", "hidden_dim", "dtype")} == {
        "vocab_size": 20,
        "n_layers": 1,
        "hidden_dim": 10,
        "dtype": "float32",
    }
    strange = huggingface.described(
        {"model_type": "t6", "torch_dtype": "float32"}, {"w": np.zeros(2, np.float16)}
    )
    assert strange == {"model_type": "t6", "torch_dtype": "float16"}
    mixed = {"model_type": "modernbert", "layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(ValueError, match="2 entries that differ, for 1 layers"):
        huggingface.described(mixed, {"model.layers.0.mlp_norm.weight": np.zeros(2)})


def test_what_no_config_describes_is_not_written(tmp_path: Path):
    source = huggingface.load(FOLDERS / "bert")
    narrow = jax.tree.map(lambda x: x[..., :1], source.params["layers_0"])
    with pytest.raises(ValueError, match="do not fit"):
        saved(tmp_path, source._replace(params={**source.params, "layers_0": narrow}))
    assert not (tmp_path / "out").exists()


def test_images_of_another_grid_are_refused():
    source = huggingface.load(FOLDERS / "vit_rectangles")
    with pytest.raises(
        ValueError, match="grid of 1 x 4 patches, but the positions belong to 2 x 2"
    ):
        jax.eval_shape(source.model, source.params, None, jnp.zeros((1, 4, 8, 3)))


def test_pixels_that_no_patch_covers_change_nothing(tmp_path: Path):
    whole = huggingface.load(FOLDERS / "vit")
    source = huggingface.load(
        edited(FOLDERS / "vit", tmp_path, image_size=18)
    )  # as SigLIP's 384 by 14
    assert source.module == whole.module.clone(unseen=(2, 2))
    images = jax.random.normal(jax.random.key(0), (1, 18, 18, 3))
    with jax.numpy_rank_promotion("allow"):
        ours, _ = source.model(source.params, None, images)
        want, _ = whole.model(whole.params, None, images[:, :16, :16])
    np.testing.assert_allclose(ours["logits"], want["logits"], atol=1e-6)
    with pytest.raises(ValueError, match="divisible by 4 after 2 and 2 pixels are left out"):
        jax.eval_shape(source.model, source.params, None, images[:, :16, :16])


def test_a_second_head_that_is_left_out_leaves_the_name_too(tmp_path: Path):
    named = {"bert_language": "BertForPreTraining", "t5": "T5Model"}
    written_as = []
    for family, name in named.items():
        source = huggingface.load(edited(FOLDERS / family, tmp_path, architectures=[name]))
        config = huggingface.described(source.config, naming.to_torch(source.params, source.rules))
        written_as += config["architectures"]
    assert written_as == ["BertForMaskedLM", "T5EncoderModel"]


def test_t5_feed_forward_layers_of_every_name(tmp_path: Path):
    source = huggingface.load(
        edited(
            FOLDERS / "t5", tmp_path, feed_forward_proj="silu", dense_act_fn=None, is_gated_act=None
        )
    )
    assert source.module.activation is jax.nn.silu and not source.module.is_gated
