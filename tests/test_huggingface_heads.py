"""Which head a folder has, and what it reads, where a file holds more or less than its class.

Expected outputs are those of transformers for the folder without the change.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from model_folders import edited, retensored

from kdtl_jax.interop import huggingface, safetensors

FOLDERS = Path(__file__).parent / "data" / "huggingface"


@pytest.mark.parametrize(("family", "prefix"), [("vit", "vit."), ("deit_teacher", "deit.")])
def test_a_classifier_of_images_reads_no_pooler(family: str, prefix: str, tmp_path: Path):
    """A file may hold the pooler of the model it was made from; PyTorch's class has none."""
    names = [f"{prefix}pooler.dense.{part}" for part in ("bias", "weight")]

    def pooling(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        width = tensors[f"{prefix}embeddings.cls_token"].shape[-1]
        return tensors | dict(zip(names, (np.ones(width), np.ones((width, width))), strict=True))

    source = huggingface.load(retensored(edited(FOLDERS / family, tmp_path), pooling))
    assert source.report.extra == tuple(names)
    assert source.module == huggingface.load(FOLDERS / family).module
    student = huggingface.student(source, layers=[0], classes=2)
    assert student.params.keys() == source.params.keys() - {"layers_1", "distillation_head"}


def test_a_classifier_without_the_pooler_that_it_reads_is_none(tmp_path: Path):
    def poolerless(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: x for name, x in tensors.items() if "pooler" not in name}

    source = huggingface.load(retensored(edited(FOLDERS / "bert", tmp_path), poolerless))
    assert source.report.extra == ("classifier.bias", "classifier.weight")
    assert source.module == huggingface.load(FOLDERS / "bert").module.clone(
        classes=None, has_pooler=False
    )


@pytest.mark.parametrize("family", ["bert_language", "deberta_tokens"])
def test_heads_whose_norms_are_spelled_as_in_tensorflow_are_read(family: str, tmp_path: Path):
    def old(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        spelled = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new_name, old_name in spelled.items():
            tensors = {name.replace(new_name, old_name): x for name, x in tensors.items()}
        return tensors

    folder, known = edited(FOLDERS / family, tmp_path), huggingface.load(FOLDERS / family)
    source = huggingface.load(retensored(folder, old))
    assert source.module == known.module and not source.report.extra
    huggingface.save(tmp_path, source.params, source.rules, config=source.config)
    assert huggingface.load(tmp_path).config["architectures"] == known.config["architectures"]
    assert safetensors.load(tmp_path).keys() == safetensors.load(folder).keys()


@pytest.mark.parametrize("copy", [False, True])
def test_the_encoder_below_a_t5_classifier_is_read_as_the_encoder(copy: bool, tmp_path: Path):
    """T5ForTokenClassification and its like keep the whole model under `transformer.`."""

    def classifying(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = {f"transformer.{name}": x for name, x in tensors.items()}
        if copy:
            out["transformer.encoder.embed_tokens.weight"] = tensors["shared.weight"]
            out["transformer.decoder.final_layer_norm.weight"] = np.ones(12, np.float32)
        return out | {"classifier.bias": np.ones(3, np.float32)}

    folder = edited(FOLDERS / "t5", tmp_path, architectures=["T5ForTokenClassification"])
    source, known = huggingface.load(retensored(folder, classifying)), FOLDERS / "t5"
    assert source.module == huggingface.load(known).module
    assert source.report.unused == (("transformer.encoder.embed_tokens.weight",) if copy else ())
    assert "classifier.bias" in source.report.extra and len(source.report.extra) == 1 + copy
    huggingface.save(tmp_path, source.params, source.rules, config=source.config)
    again = huggingface.load(tmp_path)
    assert again.config["architectures"] == ["T5EncoderModel"] and again.module == source.module


@pytest.mark.parametrize(
    ("family", "table", "copy"),
    [
        ("t5", "shared.weight", "encoder.embed_tokens.weight"),
        (
            "bert_language",
            "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.weight",
        ),
    ],
)
def test_a_tied_table_may_have_the_name_of_its_copy_alone(
    family: str, table: str, copy: str, tmp_path: Path
):
    """A writer of shared tensors keeps one of their names."""

    def renamed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {copy if name == table else name: x for name, x in tensors.items()}

    folder, known = edited(FOLDERS / family, tmp_path), huggingface.load(FOLDERS / family)
    source = huggingface.load(retensored(folder, renamed))
    assert source.module == known.module
    assert not source.report.extra and not source.report.unused
    jax.tree.map(np.testing.assert_array_equal, source.params, known.params)
    huggingface.save(tmp_path, source.params, source.rules, config=source.config)
    assert safetensors.load(tmp_path).keys() == safetensors.load(folder).keys()
    huggingface.load(tmp_path)


@pytest.mark.parametrize(
    ("family", "decoder", "table"),
    [
        ("bert_language", "cls.predictions.decoder", "bert.embeddings.word_embeddings.weight"),
        ("camembert_language", "lm_head.decoder", "roberta.embeddings.word_embeddings.weight"),
    ],
)
def test_an_output_layer_that_is_not_the_embedding_has_its_own_bias(
    family: str, decoder: str, table: str, tmp_path: Path
):
    """The head's bias beside it is read by nothing, in transformers as here."""

    def untied(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = tensors[table].shape[0]
        bias = np.arange(rows, dtype=np.float32)
        return tensors | {f"{decoder}.weight": 2 * tensors[table], f"{decoder}.bias": bias}

    known = huggingface.load(FOLDERS / family)
    folder = edited(FOLDERS / family, tmp_path, tie_word_embeddings=False)
    source = huggingface.load(retensored(folder, untied))
    assert not source.report.extra and not source.report.unused
    tokens = {"tokens": np.array([[5, 6, 7]]), "mask": np.ones((1, 3), bool)}
    before, after = (
        np.asarray(x.model(x.params, None, tokens)[0]["logits"]) for x in (known, source)
    )
    plain = before - np.asarray(known.params["language"]["bias"])
    np.testing.assert_allclose(after, 2 * plain + np.arange(before.shape[-1]), atol=1e-4)
    huggingface.save(tmp_path, source.params, source.rules, config=source.config)
    assert safetensors.load(tmp_path).keys() == safetensors.load(folder).keys()
    config = huggingface.load(tmp_path).config
    assert (
        not config["tie_word_embeddings"]
        and config["architectures"] == known.config["architectures"]
    )

    def other_bias(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: x for name, x in tensors.items() if name != f"{decoder}.weight"}

    tied = edited(folder, tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=f"its bias '{decoder}.bias' is not the head's"):
        huggingface.load(retensored(tied, other_bias))
