"""The third part of language.py: KL and its gradients by hidden states and head, in chunks."""

import gc
import subprocess
import sys
from functools import partial
from typing import Any, NamedTuple

import _rounds
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import losses
from kdtl_jax.losses import Head
from kdtl_jax.run import measure

WIDTH, TEACHER_WIDTH = 512, 1024


class Scale(NamedTuple):
    """How large a loss is, and how many tokens' logits exist at a time."""

    classes: int
    tokens: int
    chunk: int
    dtype: str = "float32"


SCALES = Scale(32_768, 1024, 256), Scale(131_072, 1024, 256)
FEW = 32  # tokens of a chunk where memory is what counts
LIGER_CHUNKS = {32_768: 1024, 131_072: 256}  # the faster of 256 and 1,024
# For these, XLA's own figure for temporary memory is printed; nothing runs.
ACCOUNTED = (
    ("dense", Scale(32_768, 2048, 2048)),
    ("chunked", Scale(32_768, 2048, 256)),
    ("chunked", Scale(32_768, 2048, 256, "bfloat16")),
    ("chunked", Scale(131_072, 1024, 256)),
    ("chunked", Scale(131_072, 1024, FEW)),
)


def arrays(scale: Scale) -> list[np.ndarray]:
    """Hidden states and kernel of the student's head, then of the teacher's, in float32."""
    rng = np.random.default_rng(0)

    def normal(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return scale * rng.standard_normal((rows, columns), np.float32)

    made = []
    for width in (WIDTH, TEACHER_WIDTH):
        made += [normal(scale.tokens, width), normal(width, scale.classes, width**-0.5)]
    return made


def products(chunk: int, h: Array, kernel: Array, teacher_h: Array, teacher_kernel: Array) -> Any:
    """The matrix products of the loss, a chunk of tokens at a time, and the sum over chunks."""
    wide = partial(jnp.matmul, preferred_element_type=jnp.float32)

    def add(total: Array, rows: Any) -> Any:
        by_logits = (wide(rows[0], kernel) - wide(rows[1], teacher_kernel)).astype(h.dtype)
        by_kernel = jax.lax.dot_general(
            rows[0], by_logits, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return total + by_kernel, by_logits @ kernel.T

    chunks = [x.reshape(-1, chunk, x.shape[-1]) for x in (h, teacher_h)]
    total, by_h = jax.lax.scan(add, jnp.zeros(kernel.shape, jnp.float32), tuple(chunks))
    return by_h, total.astype(kernel.dtype)


def chunked(chunk: int, h: Array, kernel: Array, teacher_h: Array, teacher_kernel: Array) -> Array:
    heads = Head(kernel), Head(teacher_kernel)
    return losses.chunked_divergence(
        losses.forward_kl, h, heads[0], teacher_h, heads[1], chunk_size=chunk
    ).value()


def dense(h: Array, kernel: Array, teacher_h: Array, teacher_kernel: Array) -> Array:
    return jnp.mean(losses.forward_kl(h @ kernel, teacher_h @ teacher_kernel))


def program(kind: str, scale: Scale) -> Any:
    """`(*arrays) -> (loss, (by hidden states, by kernel))`, compiled; of "products" no loss."""
    own = {"dense": dense, "chunked": partial(chunked, scale.chunk)}
    function: Any = partial(products, scale.chunk)
    if kind in own:
        function = jax.value_and_grad(own[kind], argnums=(0, 1))
    given = []
    for width in (WIDTH, TEACHER_WIDTH):
        given += [(scale.tokens, width), (width, scale.classes)]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(scale.dtype)) for shape in given]
    return jax.jit(function).lower(*shapes).compile()


def form(kind: str, scale: Scale) -> _rounds.Form:
    """`() -> ` what a program of ours, or Liger's loss, gives."""
    if kind == "Liger":
        return liger(scale)
    run, given = program(kind, scale), [jnp.asarray(x, scale.dtype) for x in arrays(scale)]
    return lambda: jax.block_until_ready(run(*given))


def liger(scale: Scale) -> _rounds.Form:
    """`() -> (loss, (by hidden states, by kernel))` of PyTorch tensors, float32."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    torch.set_num_threads(_rounds.CORES)
    h, kernel, teacher_h, teacher_kernel = map(torch.tensor, arrays(scale))
    kernel, teacher_kernel = kernel.T.contiguous(), teacher_kernel.T.contiguous()
    h.requires_grad_(True)
    kernel.requires_grad_(True)
    no_labels = torch.zeros(scale.tokens, dtype=torch.long)
    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=True, chunk_size=scale.chunk)

    def run() -> Any:
        value = loss(h, kernel, teacher_h, teacher_kernel, no_labels)
        value.backward()
        results = value.detach(), (h.grad, kernel.grad)
        h.grad = kernel.grad = None
        return results

    return run


def compare(ours: _rounds.Form, peer: _rounds.Form) -> None:
    """Stops the script where loss or gradients differ."""
    (value, by), (peer_value, peer_by) = ours(), peer()
    _rounds.agree("loss", value, peer_value, 1e-4)
    for what, one, other in zip(("h", "W"), by, peer_by, strict=True):
        norms = jnp.linalg.norm(one), other.double().norm()
        _rounds.agree(f"norm of the gradient by {what}", *norms, 1e-4)


def times(rounds: int, clock: _rounds.Clock, scale: Scale, has_liger: bool) -> _rounds.Seconds:
    """Seconds of the products alone, of this library's loss and of Liger's, once compared."""
    forms = {"products": form("products", scale), "kdtl_jax": form("chunked", scale)}
    if has_liger and scale.dtype == "float32":
        chunk = LIGER_CHUNKS[scale.classes]
        peer = liger(scale._replace(chunk=chunk))
        compare(forms["kdtl_jax"], peer)
        forms[f"Liger, compiled, chunks of {chunk}"] = peer
    seconds = _rounds.measure(forms, rounds, clock)
    _rounds.table(seconds, "kdtl_jax")
    print(f"  times the products: {_rounds.over(seconds, 'kdtl_jax', 'products'):.2f}")
    return seconds


def grown(kind: str, scale: Scale) -> float:
    """Megabytes by which the resident set grows above inputs and gradients, the second time."""
    run = form(kind, scale)
    run()
    gc.collect()

    def resident(name: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is now what is resident
    before = resident("VmRSS")
    run()
    gradients = 4 * WIDTH * (scale.tokens + scale.classes)
    return (resident("VmHWM") - before - gradients) / 1e6


def resident_memory(scale: Scale, has_liger: bool) -> dict[str, float]:
    """Megabytes of the losses, each in a process of its own."""
    print(f"\nMemory, {scale.classes:,} classes, {scale.tokens:,} tokens, float32")
    results: dict[str, float] = {}
    forms = [("chunked", FEW), ("chunked", scale.chunk), ("dense", scale.tokens)]
    if has_liger:
        forms.append(("Liger", LIGER_CHUNKS[scale.classes]))
    for kind, chunk in forms:
        command = [sys.executable, __file__, kind, *map(str, (scale.classes, scale.tokens, chunk))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        name = f"{kind}, {chunk} tokens at a time"
        if done.returncode:
            print(f"  {name}: not measured, {done.stderr.strip().splitlines()[-1:]}")
            continue
        results[name] = float(done.stdout.split()[-1])
        print(f"  {name:30s} {results[name]:7.0f} MB")
    return results


def temporaries() -> dict[str, float | None]:
    """Megabytes of temporary memory by XLA's own figure."""
    print("\nTemporary memory by XLA's figure")
    results: dict[str, float | None] = {}
    for kind, scale in ACCOUNTED:
        size = measure.memory(program(kind, scale)).temporaries
        megabytes = None if size is None else size / 1e6
        name = f"{kind}, {scale.classes:,} classes, {scale.tokens:,} tokens, {scale.dtype}"
        name += f", chunks of {scale.chunk}" * (kind == "chunked")
        print(f"  {name}: {'unknown' if megabytes is None else f'{megabytes:.0f} MB'}")
        results[name] = megabytes
    return results


def vocabulary(rounds: int, clock: _rounds.Clock) -> dict[str, Any]:
    """Times against the matrix products alone and against Liger's loss; memory."""
    has_liger = _rounds.has_peer("torch", "torch==2.13.0") and _rounds.has_peer(
        "liger-kernel", "--no-deps liger-kernel==0.8.5"
    )
    results: dict[str, Any] = {}
    for scale in SCALES:
        for dtype in ("float32", "bfloat16"):
            print(
                f"\nKL over {scale.classes:,} classes, {scale.tokens:,} tokens, {dtype}, "
                f"chunks of {scale.chunk}"
            )
            result = times(rounds, clock, scale._replace(dtype=dtype), has_liger)
            results[f"{scale.classes} {dtype}"] = {"seconds": result}
            gc.collect()
    results["resident megabytes"] = resident_memory(SCALES[-1], has_liger)
    results["temporary megabytes"] = temporaries()
    return results


if __name__ == "__main__":  # what `resident_memory` starts
    classes, tokens, chunk = map(int, sys.argv[2:])
    print(grown(sys.argv[1], Scale(classes, tokens, chunk)))
