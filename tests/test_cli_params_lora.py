"""`kdtl params lora-merge`."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from params_checkpoints import OUT, A, assert_same, flat, params, prepare, written

from kdtl_jax.interop import safetensors


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare(tmp_path, monkeypatch)
    return tmp_path


# --- adapters ------------------------------------------------------------------------------------


def pair(seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(4, 2)).astype(np.float32), rng.normal(size=(2, 3)).astype(np.float32)


def test_lora_weights_of_the_library_are_merged() -> None:
    a, b = pair()
    safetensors.save("lora.safetensors", {"head/kernel": {"a": a, "b": b}})
    words = ("lora-merge", A, "lora.safetensors", "--alpha", "6", "--weight", "0.5")
    assert params(*words, *OUT) == 0
    want = flat(1)
    want["head/kernel"] = want["head/kernel"] + np.float32(0.5 * 6 / 2) * (a @ b)
    assert_same(written(), want, rtol=1e-5)
    assert params(*words, "--scaling", "root-rank", *OUT, "--force") == 0
    want["head/kernel"] = flat(1)["head/kernel"] + np.float32(0.5 * 6 / math.sqrt(2)) * (a @ b)
    assert_same(written(), want, rtol=1e-5)


@pytest.mark.parametrize("is_dora", [False, True])
def test_peft_folders_are_merged_as_they_say(is_dora: bool) -> None:
    a, b = pair()
    kernel = flat(1)["head/kernel"].T.copy()  # torch: [out, in]
    safetensors.save("torch.safetensors", {"model.head.weight": kernel})
    Path("adapter").mkdir()
    prefix = "base_model.model.model.head.lora_"
    tensors = {f"{prefix}A.weight": a.T.copy(), f"{prefix}B.weight": b.T.copy()}
    length = np.array([1.0, 2.0, 3.0], np.float32)
    if is_dora:
        tensors[f"{prefix}magnitude_vector"] = length
    safetensors.save("adapter/adapter_model.safetensors", tensors)
    config = {"lora_alpha": 8, "r": 2, "use_rslora": True, "alpha_pattern": {}, "use_dora": is_dora}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    assert params("lora-merge", "torch.safetensors", "adapter", *OUT) == 0
    want = kernel + np.float32(8 / math.sqrt(2)) * (a @ b).T
    if is_dora:
        want = length[:, None] * want / np.linalg.norm(want, axis=1, keepdims=True)
    assert_same(written(), {"model.head.weight": want}, rtol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        ({"head/kernel/a": (4, 2), "head/kernel/b": (2, 3)}, None, "pass --alpha"),
        ({"head/kernel/a": (4, 2)}, None, "has ['a'], not a and b"),
        ({"hed/kernel/a": (4, 2), "hed/kernel/b": (2, 3)}, None, "nearest: ['head/kernel'"),
        ({"head/kernel/a": (5, 2), "head/kernel/b": (2, 3)}, {}, "does not fit: kernel [4, 3]"),
        ({"head/kernel/c": (4, 2)}, None, "is not part of a LoRA"),
    ],
)
def test_bad_adapters(tensors: Any, config: Any, says: str, capsys: Any) -> None:
    arrays = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    safetensors.save("lora.safetensors", arrays)
    alpha = [] if config is None else ["--alpha", "1"]
    assert params("lora-merge", A, "lora.safetensors", *alpha, *OUT) in (1, 2)
    assert says in capsys.readouterr().err
