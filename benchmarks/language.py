"""Language models against PyTorch: a distillation step, sampling, the loss at vocabulary scale.

Command:   python benchmarks/language.py [--parts step sampling vocabulary] [--rounds 5]
               [--busy] [--json out.json]
Peers:     PyTorch with transformers' Llama, eager and under torch.compile; Liger's chunked loss,
           compiled (each skipped with a line if it is missing; `pip install torch==2.13.0
           transformers==5.24.0` and `pip install --no-deps liger-kernel==0.8.5`).
Machine:   2 cores of an AMD EPYC virtual machine (AVX-512), nothing else running, 5 rounds; jax
           0.10.2, torch 2.13.0, transformers 5.24.0, liger-kernel 0.8.5; 333 s in all
RESULT:    step: loss and gradient equal to PyTorch's, 1e-7; PyTorch takes 0.91 times as long eager
           and 0.82 times compiled; 69% of the matrix products' speed, PyTorch 77 and 84% (before
           rows were multiplied as one matrix 0.87 and 0.82, 63%); by processor time of one busy
           core (--busy) 1.07 and 0.96. On an AMD EPYC of family 26 (AVX-512), two sittings of 5
           and 7 rounds: 1.61 and 1.61 eager, 1.51 (1.5) and 1.48 compiled
           sampling, times as long in transformers at its better thread count, two sittings: one row
           2.81 (2.8) and 2.44 (2.4), eight rows 2.26 (2.3) and 2.28; 512 of 512 greedy tokens
           equal. On a processor without AVX-512, three sittings: one row 2.59, 2.54 and 2.64, eight
           rows 1.68, 1.62 (1.6) and 1.70; the products alone take 0.82 and 0.84 of our time, so
           that one row can be 3.4 times as fast at most, eight rows 2.0. On family 26, three
           sittings of 3, 7 and 7 rounds: one row 2.99, 2.95 and 3.09 (3.1), eight rows 2.51, 2.60
           (2.6) and 2.59; the products 0.80 to 0.84 and 0.84 to 0.88
           KL over 32,768 classes, 1,024 tokens in chunks of 256, times the matrix products: float32
           1.01, bfloat16 1.03; Liger takes 1.20 times as long. Over 131,072 classes, in chunks of
           256, on a processor without AVX-512, 3 rounds, 541 s for this part: 0.99 and 1.02; Liger
           in chunks of 256 takes 1.33 times as long (over 32,768 1.19). Resident memory there: in
           chunks of 256 293 MB, of 32 125 MB, Liger 535 MB, dense 3,086 MB. Temporary memory by
           XLA's figure: 2,048 tokens over 32,768 classes in float32 88 MB (bfloat16 187 MB), dense
           1,409 MB; 1,024 tokens over 131,072 classes in chunks of 256 295 MB, of 32 60 MB

step: one KD step (forward KL, AdamW) of a decoder of 12.6 million parameters taught by one of 26.7
million, 8 x 128 tokens, vocabulary 8,192; both libraries start from the same folder of weights, and
loss and gradient are compared before anything is timed. Also reported is the share of the machine's
matrix-product speed: multiplications that the step needs, divided by its time and by those per
second of one product of 2,048 x 2,048 matrices. sampling: 64 tokens after 16 from the same decoder,
through a cache of keys and values, with one row and with eight, next to the products of its kernels
and nothing else; greedy continuations are compared first. vocabulary: KL and its gradients by
hidden states and head (width 512, teacher's 1,024) in chunks of tokens, next to the same matrix
products in the same chunks and nothing else ("products"); value and gradient are compared with
Liger's. Memory is the growth of the resident set above the inputs and the gradients, in a separate
process, the second time it runs.

A round runs every form once; ratios are medians over the rounds' own ratios. On an accelerator the
decoders compute in bfloat16, and the peers, which are for CPUs, are left out.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _rounds import CORES, ON_CPU, Clock, Form, agree, has_peer, measure, table
from _vocabulary import vocabulary
from jax import Array

from kdtl_jax import language, losses, models, train
from kdtl_jax.interop import decoders

ROWS, LENGTH, PROMPT, NEW = (8, 128, 16, 64) if ON_CPU else (64, 512, 16, 64)
Results = dict[str, Any]


def config(width: int, hidden: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }


STUDENT, TEACHER = config(384, 1024, 6), config(512, 1408, 8)


def decoder_pair() -> tuple[decoders.PretrainedDecoder, decoders.PretrainedDecoder]:
    keys = jax.random.split(jax.random.key(0))
    student, teacher = map(decoders.initialized, (STUDENT, TEACHER), keys)
    # Sharper than at the start of training, so that greedy texts do not hang on ties.
    return student._replace(params=jax.tree.map(lambda x: 2 * x, student.params)), teacher


def in_torch(source: decoders.PretrainedDecoder) -> Any:
    """The same weights as transformers' model."""
    import transformers

    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        decoders.save(folder, source.params, source.rules, config=source.config)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def size(source: decoders.PretrainedDecoder) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(source.params))


def step_flops(student: decoders.PretrainedDecoder, teacher: decoders.PretrainedDecoder) -> float:
    """Multiply-adds twice: of the teacher forward, of the student forward and twice backward."""
    of_attention = [
        4 * LENGTH * c["num_hidden_layers"] * c["hidden_size"] for c in (STUDENT, TEACHER)
    ]
    forward = [2 * size(s) + a for s, a in zip((student, teacher), of_attention, strict=True)]
    return ROWS * LENGTH * (3 * forward[0] + forward[1])


def step(rounds: int, clock: Clock) -> Results:
    print("\nKD step")
    student, teacher = decoder_pair()
    dtype = jnp.float32 if ON_CPU else jnp.bfloat16
    model, teacher_model = (
        models.decoder(source.model.config, dtype=dtype) for source in (student, teacher)
    )
    tx = optax.adamw(1e-4)
    run = train.jit_step(language.kd(language.Setup(model, tx, teacher=teacher_model)).step)
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, STUDENT["vocab_size"])
    batch = {"inputs": {"tokens": tokens}}

    @jax.jit
    def value_and_norm(params: Any, teacher_params: Any) -> Any:
        def loss(params: Any) -> Array:
            hidden, _ = model.apply(params, tokens)
            teacher_hidden, _ = teacher_model.apply(teacher_params, tokens)
            ours = hidden, model.head(params)
            others = teacher_hidden, teacher_model.head(teacher_params)
            where = jnp.arange(LENGTH)[None].repeat(ROWS, 0) < LENGTH - 1
            return losses.chunked_divergence(losses.forward_kl, *ours, *others, where=where).value()

        value, gradient = jax.value_and_grad(loss)(params)
        return value, optax.global_norm(gradient)

    expected = [float(x) for x in value_and_norm(student.params, teacher.params)]
    state = train.init_state(jax.tree.map(jnp.copy, student.params), tx, key=jax.random.key(2))
    first = True

    def jax_step() -> None:
        nonlocal state, first
        state, metrics = run(state, batch, teacher.params)
        jax.block_until_ready(state)
        if first:
            agree("kdtl_jax's step and its loss apart", metrics["loss"].value(), expected[0], 1e-3)
            first = False

    n = 2048 if ON_CPU else 8192
    square = jax.random.normal(jax.random.key(3), (n, n)).astype(dtype)
    product = jax.jit(jnp.matmul)
    forms: dict[str, Form] = {
        "kdtl_jax": jax_step,
        f"one product of {n} x {n}": lambda: jax.block_until_ready(product(square, square)),
    }
    if has_peer("torch", "torch==2.13.0") and has_peer("transformers", "transformers==5.24.0"):
        forms |= torch_steps(student, teacher, np.asarray(tokens), expected)
    seconds = measure(forms, rounds, clock)
    flops = step_flops(student, teacher)
    ceiling = 2 * n**3 / min(seconds[f"one product of {n} x {n}"])
    share = {
        name: f"{flops / statistics.median(times) / ceiling:5.1%} of the products' speed"
        for name, times in seconds.items()
        if not name.startswith("one product")
    }
    per_second = ROWS * LENGTH / statistics.median(seconds["kdtl_jax"])
    print(
        f"  {size(student):,} parameters taught by {size(teacher):,}, {ROWS} x {LENGTH} tokens, "
        f"{flops / 1e9:.0f} GFLOP; {ceiling / 1e9:.0f} GFLOP/s; {per_second:.0f} tokens/s"
    )
    table(seconds, "kdtl_jax", share)
    return {"seconds": seconds, "flops": flops, "ceiling": ceiling, "tokens_per_second": per_second}


def torch_steps(student: Any, teacher: Any, tokens: np.ndarray, expected: list[float]) -> Any:
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(CORES)
    data = torch.tensor(tokens).long()
    frozen = in_torch(teacher).eval().requires_grad_(False)

    def build(is_compiled: bool) -> Form:
        learner = in_torch(student)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-4, fused=True)

        def loss() -> Any:
            with torch.no_grad():
                teacher_logits = frozen(data, use_cache=False).logits[:, :-1].flatten(0, 1)
                log_p_teacher = F.log_softmax(teacher_logits, dim=-1)
            logits = learner(data, use_cache=False).logits[:, :-1].flatten(0, 1)
            log_p = F.log_softmax(logits, dim=-1)
            return F.kl_div(log_p, log_p_teacher, reduction="batchmean", log_target=True)

        run, is_first = torch.compile(loss) if is_compiled else loss, True

        def form() -> None:
            nonlocal is_first
            optimizer.zero_grad()
            value = run()
            value.backward()
            if is_first:
                norm = torch.stack([p.grad.double().norm() for p in learner.parameters()]).norm()
                agree("loss", expected[0], value.item(), 1e-4)
                agree("norm of the gradient", expected[1], norm.item(), 1e-4)
                is_first = False
            optimizer.step()

        return form

    return {"torch eager": build(False), "torch.compile": build(True)}


def products(source: decoders.PretrainedDecoder, rows: int) -> Form:
    """Every kernel times a few rows, once per sampled token: what a decoder cannot do without."""
    table = source.params["tokens"]["embedding"]
    kernels = [
        leaf for leaf in jax.tree.leaves(source.params) if leaf.ndim == 2 and leaf is not table
    ]
    inputs = jax.random.normal(jax.random.key(6), (rows, max(len(k) for k in kernels)))

    @jax.jit
    def run(kernels: list[Array], inputs: Array) -> Array:
        def step(_: Any, largest: Array) -> Array:
            for kernel in kernels:  # one after another, as in a decoder
                outputs = (inputs[:, : len(kernel)] + 1e-9 * largest) @ kernel
                largest = jnp.max(outputs)
            return largest

        return jax.lax.fori_loop(0, NEW, step, jnp.float32(0))

    return lambda: run([*kernels, table.T], inputs).block_until_ready()


def sampling(rounds: int, clock: Clock) -> Results:
    print(f"\nSampling: {NEW} tokens after {PROMPT}")
    student, _ = decoder_pair()
    prompts = jax.random.randint(jax.random.key(4), (8, PROMPT), 0, STUDENT["vocab_size"])

    @partial(jax.jit, static_argnames="rows")
    def sample(params: Any, key: Array, temperature: Array, rows: int) -> Array:
        keys = jax.random.split(key, rows)
        more: Any = {"keys": keys, "length": NEW, "temperature": temperature}
        return language.sample(student.model, params, prompts[:rows], **more).tokens

    def ours(rows: int) -> Form:
        return lambda: sample(
            student.params, jax.random.key(5), jnp.float32(1), rows
        ).block_until_ready()

    forms: dict[str, Form] = {f"kdtl_jax, {rows} rows": ours(rows) for rows in (1, 8)}
    forms |= {f"products alone, {rows} rows": products(student, rows) for rows in (1, 8)}
    if has_peer("torch", "torch==2.13.0") and has_peer("transformers", "transformers==5.24.0"):
        import torch

        model = in_torch(student).eval()
        fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}

        def generate(rows: int, **how: Any) -> Any:
            given = torch.tensor(np.asarray(prompts[:rows])).long()
            mask = torch.ones_like(given)
            with torch.inference_mode():
                return model.generate(given, attention_mask=mask, **fixed, **how)

        model.generation_config.eos_token_id = None
        greedy = np.asarray(sample(student.params, jax.random.key(5), jnp.float32(0), 8))
        same = greedy == generate(8, do_sample=False)[:, PROMPT:].numpy()
        print(f"  greedy continuations equal to transformers': {same.mean():.1%} of {same.size}")
        if same.mean() < 0.95:
            raise SystemExit("greedy continuations differ from transformers'.")

        def peer(rows: int, threads: int) -> Form:
            def form() -> None:
                torch.set_num_threads(threads)
                generate(rows, do_sample=True, top_k=0)
                torch.set_num_threads(CORES)

            return form

        for rows in (1, 8):
            for threads in sorted({1, CORES}):
                forms[f"transformers, {rows} rows, {threads} threads"] = peer(rows, threads)
    seconds = measure(forms, rounds, clock)
    for rows in (1, 8):
        own = {name: times for name, times in seconds.items() if f" {rows} rows" in name}
        table(
            own,
            f"kdtl_jax, {rows} rows",
            {
                name: f"{rows * NEW / statistics.median(times):.0f} tokens/s"
                for name, times in own.items()
            },
        )
    return {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Example: python benchmarks/language.py")
    parts = {"step": step, "sampling": sampling, "vocabulary": vocabulary}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=5, help="of the losses 3 at most")
    parser.add_argument("--json", help="write the seconds here")
    parser.add_argument(
        "--busy", action="store_true", help="processor time, for a busy machine (with taskset -c 0)"
    )
    args = parser.parse_args()
    clock = time.process_time if args.busy else time.perf_counter
    names = ("kdtl_jax", "jax", "torch", "transformers", "liger-kernel")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0].device_kind
    print(f"{platform.machine()}, {CORES} cores, {device}, load {os.getloadavg()[0]:.1f}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    begun = time.perf_counter()
    results = {
        name: parts[name](min(3, args.rounds) if name == "vocabulary" else args.rounds, clock)
        for name in args.parts
    }
    print(f"\n{time.perf_counter() - begun:.0f} s; load {os.getloadavg()[0]:.1f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"versions": versions, **results}, file, indent=1)


if __name__ == "__main__":
    main()
