"""A pretrained sentence encoder becomes a small classifier: Flax Linen, 13 lines after the imports.

    python examples/minilm_linen.py all-MiniLM-L6-v2/ examples.npz student/

The folder is a Hugging Face checkpoint of the BERT kind; `examples.npz` holds token ids `inputs`
[N, L] and `labels` [N] (0 or 1). It takes 3 of 6 layers, replaces the head and reports what came
from where; trains only the head, then everything with layer-wise learning rates, then a LoRA, which
is merged; and exports safetensors that PyTorch can read.
"""

import sys
from functools import partial

import jax
import numpy as np
import optax

from kdtl_jax import transforms
from kdtl_jax.interop import huggingface
from kdtl_jax.objective import classification
from kdtl_jax.run import data, loop
from kdtl_jax.train import finetune

folder, examples, out = sys.argv[1:]
student = huggingface.student(huggingface.load(folder), layers=(1, 3, 5), classes=2)
print(student.report)
batches = data.resident(dict(np.load(examples)), 8, key=jax.random.key(0))
fit = partial(loop.fit, terms=classification, weights={"task": 1.0}, source=batches, steps=100)

params = fit(student.model, student.params, optax.adam(1e-2), trainable="head/.*").params
rates = finetune.by_layer(params, stem="emb.*", block=r"layers_(\d+)/.*", head="(pooler|head)/.*")
params = fit(student.model, params, optax.chain(optax.adam(1e-3), rates)).params

lora = transforms.lora(rank=2)
start = lora.init(jax.random.key(1), params, where=".*/(query|value)/kernel")
adapted = transforms.adapted_model(student.model, lora)
tuned = fit(adapted, start, optax.adam(1e-3), trainable="adapter/.*").params
huggingface.save(out, lora.merge(*tuned), student.rules, config=student.config)
