"""`kdtl params`: weight surgery on safetensors files, streamed, with a report first.

Every action reads headers, decides on names and shapes, prints a `Report`, and stops there unless
`--write` is given. Values are then streamed tensor by tensor; elementwise operations use pieces of
4 MB, and TIES over whole models reads all of them three times before it writes. A folder is written
with the configuration and tokenizer of the first input, so that it can be loaded.
"""

from kdtl_jax.cli import Command

_here = "kdtl_jax.cli.params"

COMMANDS = (
    Command("inspect", "list a checkpoint's tensors", f"{_here}.inspect"),
    Command("diff", "compare two checkpoints", f"{_here}.diff"),
    Command("scale", "multiply weights: small = alpha * large", f"{_here}.scale"),
    Command("transfer", "fill a target's weights from a source's", f"{_here}.transfer"),
    Command("slice", "keep some layers, units or tensors", f"{_here}.slice"),
    Command("average", "average models, weighted or not", f"{_here}.average"),
    Command("merge", "merge models: TIES, DARE, SLERP, Fisher and others", f"{_here}.merge"),
    Command("lora-merge", "add a LoRA's or DoRA's weights to its base", f"{_here}.lora_merge"),
)
