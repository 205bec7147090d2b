"""A pretrained sentence encoder becomes a small classifier: Flax NNX, 15 lines after the imports.

    python examples/minilm_nnx.py all-MiniLM-L6-v2/ examples.npz student/

Like minilm_linen.py, but for your own model (`nnx_encoder.py`), which names its layers differently:
`layers/0` for `layers_0`, renamed on import and on export.
"""

from functools import partial
from sys import argv

import jax
import numpy as np
import optax
from flax.nnx import Rngs
from nnx_encoder import Encoder

from kdtl_jax import transforms
from kdtl_jax.interop import huggingface, nnx
from kdtl_jax.objective import classification
from kdtl_jax.run import data, loop
from kdtl_jax.train import finetune

student = huggingface.student(huggingface.load(argv[1]), layers=(1, 3, 5), classes=2)
model, fresh, state = nnx.model(Encoder(student.module, rngs=Rngs(0)))
params, report = transforms.transfer(student.params, fresh, rename=[("layers_(.*)", r"layers/\1")])
print(student.report, report, sep="\n")
batches = data.resident(dict(np.load(argv[2])), 8, key=jax.random.key(0))
fit = partial(loop.fit, terms=classification, weights={"task": 1.0}, source=batches, steps=100)

params = fit(model, params, optax.adam(1e-2), trainable="head/.*", model_state=state).params
rates = finetune.by_layer(params, stem="emb.*", block=r"layers/(\d+)/.*", head="(pooler|head)/.*")
params = fit(model, params, optax.chain(optax.adam(1e-3), rates), model_state=state).params

lora = transforms.lora(rank=2)
start = lora.init(jax.random.key(1), params, where=".*/(query|value)/kernel")
adapted = transforms.adapted_model(model, lora)
tuned = fit(adapted, start, optax.adam(1e-3), trainable="adapter/.*", model_state=state).params
rules = [rule._replace(jax=rule.jax.replace("layers_", "layers/")) for rule in student.rules]
huggingface.save(argv[3], lora.merge(*tuned), rules, config=student.config)
