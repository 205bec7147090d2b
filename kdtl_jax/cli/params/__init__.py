"""`kdtl params`: weight surgery on safetensors files, streamed, with a report first.

Every action reads headers, decides on names and shapes, prints a `Report`, and stops there: writing
needs `--write`. Values then pass through in pieces of 4 MB, so memory holds pieces, not tensors. A
merge that ranks, draws or measures within a tensor reads it several times for that; TIES over whole
models reads all of them three times before it writes. Whole tensors are held where a shape changes,
for matrix products (LoRA, `regmean`), and by such merges for tensors of double precision.
"""

from kdtl_jax.cli import Command

_here = "kdtl_jax.cli.params"

COMMANDS = (
    Command("inspect", "what a checkpoint holds", f"{_here}.inspect"),
    Command("diff", "what differs between two checkpoints", f"{_here}.diff"),
    Command("scale", "multiply weights: small = alpha * large", f"{_here}.scale"),
    Command("transfer", "fill a target's weights from a source's", f"{_here}.transfer"),
    Command("slice", "keep some layers, units or tensors", f"{_here}.slice"),
    Command("average", "average models, weighted or not", f"{_here}.average"),
    Command("merge", "merge models: TIES, DARE, SLERP, Fisher and others", f"{_here}.merge"),
    Command("lora-merge", "add a LoRA's or DoRA's weights to its base", f"{_here}.lora_merge"),
)
