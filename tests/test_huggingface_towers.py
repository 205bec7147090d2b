"""One tower of a whole CLIP or SigLIP folder, compared with transformers 5.24's features."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax.interop import huggingface, safetensors

DATA = Path(__file__).parent / "data"
OUTPUT = {"clip": {"vision": "image_embedding", "text": "text_embedding"}}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_tower_gives_its_features_and_is_saved_alone(
    kind: str, tower: Literal["vision", "text"], tmp_path: Path
) -> None:
    folder = DATA / f"{kind}_whole"
    arrays = dict(np.load(folder / "expected.npz"))
    source = huggingface.load(folder, tower=tower)
    given, expected = ("images", "image") if tower == "vision" else ("tokens", "text")

    def compare(model: huggingface.Pretrained) -> None:
        outputs, _ = jax.jit(model.model)(model.params, None, jnp.asarray(arrays[given]))
        name = OUTPUT.get(kind, {}).get(tower, "pooled")
        np.testing.assert_allclose(outputs[name], arrays[expected], atol=3e-6)

    compare(source)
    other = {"vision": "text", "text": "vision"}[tower]
    assert any(name.startswith(f"{other}_model.") for name in source.report.extra)
    assert "logit_scale" in source.report.extra and source.report.fraction == 1
    stored = safetensors.index(folder).tensors
    assert len(source.report.copied) + len(source.report.extra) == len(stored)
    huggingface.save(tmp_path / "alone", source.params, source.rules, config=source.config)
    assert source.config["model_type"] == f"{kind}_{tower}_model"
    compare(huggingface.load(tmp_path / "alone"))


def test_which_tower_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two towers; pass tower='vision' or tower='text', got No"):
        huggingface.load(DATA / "clip_whole")
    with pytest.raises(ValueError, match="'vit' has no text tower"):
        huggingface.load(DATA / "huggingface" / "vit", tower="text")
    folder = tmp_path / "clip"
    shutil.copytree(DATA / "clip_whole", folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    old = config | {"text_config_dict": {"hidden_act": "gelu"}, "vision_config": None}
    (folder / "config.json").write_text(json.dumps(old))
    assert huggingface.load(folder, tower="text").config["hidden_act"] == "gelu"  # old folders
    with pytest.raises(ValueError, match="has no vision_config"):
        huggingface.load(folder, tower="vision")
    for odd in ([1], "gelu", 3):
        (folder / "config.json").write_text(json.dumps(config | {"vision_config_dict": odd}))
        with pytest.raises(ValueError, match="vision_config_dict must be an object or null, got"):
            huggingface.load(folder, tower="vision")
