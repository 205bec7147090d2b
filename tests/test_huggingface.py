"""Folders of every family, imported and compared with PyTorch's outputs.

The folders in tests/data/huggingface hold tiny random weights written by transformers 5.23 or
5.24 (torch 2.13), each with the outputs of that model on fixed inputs in expected.npz.
"""

import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import edited, retensored

from kdtl_jax import models, trees
from kdtl_jax.interop import huggingface, linen, naming, safetensors

FOLDERS = Path(__file__).parent / "data" / "huggingface"
FAMILIES = sorted(folder.name for folder in FOLDERS.iterdir())
WHERE = {  # name in expected.npz -> name among our outputs
    "hidden_1": "layers_0",
    "attention_0": "layers_0/attention/probs",
    "attention_1": "layers_1/attention/probs",
    "hidden_2": "stage1",
}


def expected(family: str) -> dict[str, np.ndarray]:
    with np.load(FOLDERS / family / "expected.npz") as file:
        return dict(file)


def inputs_of(arrays: dict[str, np.ndarray]) -> Any:
    if "images" in arrays:
        return jnp.asarray(arrays["images"])
    given = {
        name: jnp.asarray(arrays[name]) for name in ("tokens", "mask", "types") if name in arrays
    }
    return given if len(given) > 1 else given["tokens"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("standard_promotion")
def test_outputs_are_those_of_the_torch_model(family: str):
    arrays = expected(family)
    inputs = inputs_of(arrays)
    taps = [WHERE[name] for name in arrays if name in WHERE and name != "hidden_2"]
    source = huggingface.load(FOLDERS / family, taps=taps)
    run = jax.jit(source.model)
    outputs, _ = run(source.params, source.model_state, inputs)
    compared = 0
    for name, value in arrays.items():
        ours = outputs.get(WHERE.get(name, name))
        if ours is not None:
            scale = max(1.0, float(np.abs(value).max()))
            np.testing.assert_allclose(ours, value, atol=3e-6 * scale, err_msg=name)
            compared += 1
    assert compared == len([n for n in arrays if n not in ("tokens", "mask", "types", "images")])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_imported_or_reported_and_exported_bit_for_bit(family: str, tmp_path: Path):
    source = huggingface.load(FOLDERS / family)
    report = source.report
    stored = safetensors.load(FOLDERS / family)
    assert report.fraction == 1 and not report.missing and not report.extra
    assert all(name.endswith("num_batches_tracked") for name in report.unused)
    assert len(report.copied) + len(report.unused) == len(stored)
    huggingface.save(
        tmp_path / "out",
        source.params,
        source.rules,
        config=source.config,
        model_state=source.model_state,
    )
    written = safetensors.load(tmp_path / "out")
    assert written.keys() == stored.keys()  # with the counts of batches, which PyTorch asks for
    for name, array in written.items():
        assert array.dtype == stored[name].dtype
        np.testing.assert_array_equal(array, stored[name], err_msg=name)
    assert safetensors.index(tmp_path / "out").metadata == {"format": "pt"}
    again = huggingface.load(tmp_path / "out")
    assert again.module == source.module and again.config == source.config


def test_a_student_of_fewer_layers_is_named_by_the_same_rules(tmp_path: Path):
    source = huggingface.load(FOLDERS / "bert")
    params = {k: v for k, v in source.params.items() if k != "layers_1"}
    config = {**source.config, "num_hidden_layers": 1}
    huggingface.save(tmp_path, params, source.rules, config=config)
    assert huggingface.load(tmp_path).module == source.module.clone(layers=1)


def test_old_checkpoints_in_other_spellings_are_read(tmp_path: Path):
    def old(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        renamed = {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): v
            for k, v in tensors.items()
        }
        return renamed | {
            "bert.embeddings.position_ids": np.arange(16)[None],
            "cls.predictions.bias": np.zeros(40, np.float32),
        }

    source = huggingface.load(retensored(edited(FOLDERS / "bert", tmp_path), old))
    assert source.report.unused == ("bert.embeddings.position_ids",)
    assert source.report.extra == ("cls.predictions.bias",)
    assert "extra" in str(source.report) and "cls.predictions.bias" in str(source.report)
    for ours, theirs in zip(
        jax.tree.leaves(source.params),
        jax.tree.leaves(huggingface.load(FOLDERS / "bert").params),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_heads_for_other_tasks_are_left_out_and_reported(tmp_path: Path):
    folder = edited(FOLDERS / "bert", tmp_path, architectures=["BertForMultipleChoice"])
    source = huggingface.load(folder)
    assert "head" not in source.params
    assert source.report.extra == ("classifier.bias", "classifier.weight")


def test_nan_in_a_checkpoint_is_reported_by_path(tmp_path: Path):
    def spoiled(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors["vit.layernorm.bias"][3] = np.nan
        return tensors

    source = huggingface.load(retensored(edited(FOLDERS / "vit", tmp_path), spoiled))
    assert source.report.nonfinite == ("norm/bias",)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("bert", {"model_type": "bart"}, "model_type 'bart' is not supported"),
        ("bert", {"model_type": ...}, "no 'model_type'"),
        ("bert", {"hidden_size": ...}, "no 'hidden_size'"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"hidden_act": "mish"}, "activation 'mish'"),
        ("bert", {"hidden_size": 24}, r"\[12"),
        ("bert", {"num_hidden_layers": 3}, "layers_2"),
        ("bert", {"num_hidden_layers": 1}, "layers_1"),
    ],
)
def test_what_is_not_built_here_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], says: str
):
    with pytest.raises(ValueError, match=says):
        huggingface.load(edited(FOLDERS / family, tmp_path, **changes))


def test_unknown_tensors_are_refused_with_the_nearest_rules(tmp_path: Path):
    def stranger(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors | {"bert.encoder.layer.0.adapter.weight": np.zeros((2, 2), np.float32)}

    with pytest.raises(ValueError, match="no rule covers .*adapter.*nearest rules"):
        huggingface.load(retensored(edited(FOLDERS / "bert", tmp_path), stranger))


def test_bad_folders_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        huggingface.load(tmp_path / "nowhere" / "deep")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(FileNotFoundError, match="a pickle, which is never loaded"):
        huggingface.load(tmp_path)


def test_a_repository_is_fetched_by_the_hub_client(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(FOLDERS / "vit")

    hub = types.ModuleType("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert huggingface.load("some-org/some-vit").module == huggingface.load(FOLDERS / "vit").module
    assert asked["name"] == "some-org/some-vit"
    assert not any(p.endswith((".bin", ".pt", ".py")) or p == "*" for p in asked["patterns"])
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"kdtl_jax\[hub\]"):
        huggingface.load("some-org/some-vit")


@pytest.mark.usefixtures("standard_promotion")
def test_padding_never_changes_what_is_there():
    source = huggingface.load(FOLDERS / "bert")
    tokens = jnp.asarray(expected("bert")["tokens"])
    run = jax.jit(source.model)
    short, _ = run(source.params, None, tokens[:, :4])
    mask = jnp.arange(7)[None] < jnp.array([[4], [4]])
    long, _ = run(source.params, None, {"tokens": tokens, "mask": mask})
    np.testing.assert_allclose(long["last_hidden"][:, :4], short["last_hidden"], atol=2e-6)


@pytest.mark.parametrize(
    ("module", "inputs", "says"),
    [
        (models.Bert(9, 4, 1, 2, 4, 6), jnp.zeros((2, 7), jnp.int32), "7 tokens.*6 positions"),
        (models.Bert(9, 4, 1, 2, 4, 6), jnp.zeros((7,), jnp.int32), r"tokens must be \[B, L\]"),
        (models.Bert(9, 4, 1, 2, 4, 6), {"ids": jnp.zeros((2, 3), jnp.int32)}, r"keys \['ids'\]"),
        (
            models.Bert(9, 4, 1, 2, 4, 6),
            {"tokens": jnp.zeros((2, 3), jnp.int32), "mask": jnp.ones((2, 4), jnp.bool_)},
            r"mask must be \[B, L\]",
        ),
        (models.ViT(4, 1, 2, 4, 4), jnp.zeros((2, 10, 8, 3)), "sides divisible by 4"),
        (models.ImageResNet(4, (4,), (1,)), jnp.zeros((2, 8, 8)), r"must be \[B, H, W, C\]"),
    ],
)
def test_models_refuse_wrong_inputs(module: Any, inputs: Any, says: str):
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(linen.model(module).init, jax.random.key(0), inputs)


def test_float_tokens_are_refused():
    run = linen.model(models.Bert(9, 4, 1, 2, 4, 6))
    with pytest.raises(TypeError, match="tokens must be integers, got float32"):
        jax.eval_shape(run.init, jax.random.key(0), jnp.zeros((1, 2)))


def test_sentence_embeddings_ignore_padding_and_have_unit_length():
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 5)), jnp.float32)
    mask = jnp.array([[True, True, False, False], [True] * 4, [False] * 4])
    spoiled = jnp.where(mask[..., None], hidden, jnp.nan)
    embedding = jax.jit(models.sentence_embedding)(spoiled, mask)
    plain = np.asarray(hidden[0, :2]).mean(0)
    np.testing.assert_allclose(embedding[0], plain / np.linalg.norm(plain), rtol=1e-5)
    np.testing.assert_array_equal(embedding[2], np.zeros(5))
    np.testing.assert_allclose(models.mean_pool(hidden), np.asarray(hidden).mean(1), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda h: jnp.sum(models.sentence_embedding(h, mask))))(hidden)
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_rules_name_every_leaf_of_every_module():
    for family in FAMILIES:
        source = huggingface.load(FOLDERS / family)
        leaves = {**source.params, **(source.model_state or {})}
        names = naming.to_torch(leaves, source.rules)
        assert len(names) == len(trees.flatten(leaves))
