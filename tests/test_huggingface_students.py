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
    source = huggingface.load(FOLDERS / "llama")
    student = huggingface.student(source, layers=(1, 0, 1))
    for new, old in enumerate((1, 0, 1)):
        same(student.params[f"layers_{new}"], source.params[f"layers_{old}"])
    same(student.params["head"], source.params["head"])
    huggingface.save(tmp_path, student.params, student.rules, config=student.config)
    assert huggingface.load(tmp_path).module == student.module
    tokens = jnp.zeros((1, 3), jnp.int32)
    outputs = jax.eval_shape(student.model, student.params, None, tokens)[0]
    assert outputs["logits"].shape[:2] == (1, 3)


def test_what_cannot_be_a_student_is_refused():
    source = huggingface.load(FOLDERS / "gpt2")
    with pytest.raises(ValueError, match="layers must lie in 0..1, got \\[2\\]"):
        huggingface.student(source, layers=(2,))
    with pytest.raises(ValueError, match="'gpt2' model takes no new head"):
        huggingface.student(source, layers=(0,), classes=2)
    resnet = huggingface.load(FOLDERS / "resnet_basic")
    with pytest.raises(ValueError, match="'resnet' model has no numbered layers"):
        huggingface.student(resnet, layers=(0,))
