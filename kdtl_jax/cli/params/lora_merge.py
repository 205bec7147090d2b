"""`kdtl params lora-merge`: `W' = W + s a b`, LoRA's and DoRA's, as plain weights."""
from dataclasses import dataclass
from kdtl_jax.cli.params._checkpoints import Writing
from kdtl_jax.cli.params import _checkpoints
EXAMPLES=f"""
kdtl params lora-merge base/ adapter/ --write merged.safetensors
{_checkpoints.SELECTORS}"""
@dataclass(frozen=True)
class Settings(Writing):
    """x"""
