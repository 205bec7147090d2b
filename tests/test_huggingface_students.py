"""Shallower models with new heads, from folders of every family, and their own checkpoints."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import trees
from kdtl_jax.interop import huggingface, safetensors

FOLDERS = Path(__file__).parent / "data" / "huggingface"


def same(ours: object, theirs: object) -> None:
    for path, leaf in trees.flatten(ours).items():
        np.testing.assert_array_equal(leaf, trees.flatten(theirs)[path], err_msg=path)


@pytest.mark.parametrize(
    ("family", "new", "head"),
    [
        ("bert_base", {"head"}, "classifier.weight"),
        ("bert", {"head"}, "classifier.weight"),
        ("distilbert", {"head"}, "classifier.weight"),
        ("roberta", {"head", "pooler"}, "classifier.out_proj.weight"),
        ("vit", {"head"}, "classifier.weight"),
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_a_student_with_a_new_head_is_a_checkpoint_of_its_own(
    family: str, new: set[str], head: str, tmp_path: Path
):
    source = huggingface.load(FOLDERS / family)
    student = huggingface.student(source, layers=(1,), classes=4, key=jax.random.key(3))
    assert {kept.path.split("/")[0] for kept in student.report.kept} == new
    same(student.params["layers_0"], source.params["layers_1"])
    same(student.params["embeddings"], source.params["embeddings"])
    assert student.params["head"]["kernel"].shape[-1] == 4
    huggingface.save(tmp_path, student.params, student.rules, config=student.config)
    assert safetensors.load(tmp_path)[head].shape[0] == 4
    again = huggingface.load(tmp_path)
    assert again.module == student.module and again.report.fraction == 1
    assert not again.report.extra and not again.report.unused
    same(again.params, student.params)


def test_layers_alone_are_selected_and_may_repeat(tmp_path: Path):
    source = huggingface.load(FOLDERS / "bert")
    student = huggingface.student(source, layers=(1, 0, 1))
    for new, old in enumerate((1, 0, 1)):
        same(student.params[f"layers_{new}"], source.params[f"layers_{old}"])
    same(student.params["head"], source.params["head"])
    huggingface.save(tmp_path, student.params, student.rules, config=student.config)
    assert huggingface.load(tmp_path).module == student.module
    tokens = jnp.zeros((1, 3), jnp.int32)
    outputs = jax.eval_shape(student.model, student.params, None, tokens)[0]
    assert outputs["last_hidden"].shape[:2] == (1, 3)


def test_what_cannot_be_a_student_is_refused():
    source = huggingface.load(FOLDERS / "t5")
    with pytest.raises(ValueError, match="layers must lie in 0..0, got \\[2\\]"):
        huggingface.student(source, layers=(2,))
    with pytest.raises(ValueError, match="'t5' model cannot take a new head"):
        huggingface.student(source, layers=(0,), classes=2)
    resnet = huggingface.load(FOLDERS / "resnet_basic")
    with pytest.raises(ValueError, match="'resnet' model has no numbered layers"):
        huggingface.student(resnet, layers=(0,))


@pytest.mark.usefixtures("standard_promotion")
def test_what_layers_differ_in_goes_with_them(tmp_path: Path):
    source = huggingface.load(FOLDERS / "modernbert_language")
    assert source.module.windows == (None, 2)
    student = huggingface.student(source, layers=(0, 1, 1))
    assert student.module.windows == (None, 2, 2)
    assert student.module.ropes == tuple(source.module.ropes[i] for i in (0, 1, 1))
    huggingface.save(tmp_path, student.params, student.rules, config=student.config)
    assert huggingface.load(tmp_path).module == student.module
    # The same where the config gives a pattern instead of a list.
    config = {**source.config, "layer_types": None, "global_attn_every_n_layers": 2}
    again = huggingface.student(source._replace(config=config), layers=(0, 1, 1))
    assert again.module == student.module
    for classes in (None, 2):  # the first layer has no norm of its own
        with pytest.raises(ValueError, match="layer 1 .* has 'attention_norm/.*keep it first"):
            huggingface.student(source, layers=(1, 1), classes=classes)


def test_students_keep_the_dtypes_of_their_source():
    source = huggingface.load(FOLDERS / "bert", dtype=jnp.bfloat16)
    small = huggingface.student(source, layers=(1,))
    assert {str(x.dtype) for x in jax.tree.leaves(small.params)} == {"bfloat16"}
    headed = huggingface.student(source, layers=(1,), classes=2)
    kinds = {path.split("/")[0]: str(x.dtype) for path, x in trees.flatten(headed.params).items()}
    assert kinds["layers_0"] == "bfloat16" and kinds["head"] == "float32"
