"""Names in backticks in docstrings exist: nothing refers to what was renamed."""

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from documents import leads_somewhere

import kdtl_jax

PACKAGE = Path(kdtl_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
DOTTED = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*\))?")
# Names of other systems, of the papers' variables and of parameters of the reader's own model.
FOREIGN = set(
    """
    att_ce_loss mmd_loss fsp_loss AffinityLoss GKDTrainer generalized_jsd_loss js_distance
    kd_ce_loss kd_mse_loss hid_mse_loss skewed_forward_kl skewed_reverse_kl tv_distance MFTLoss
    cc_loss bc_loss SKDDirectionLoss LogitStdKDLoss loss_add_tail distill_top_k sparse_hinge_loss
    sparse_logistic_ranking_loss L2Loss OFDLoss feat_loss L2Regularization SPRegularization
    StaticLossBalancer param_groups_layer_decay LayerDecayValueAssigner nearswap ramplus_tl
    multislerp magnitude_prune hessian Partitioned reduce_on_plateau FakeTensorQuantFunction
    NVFP4QTensor binary_ce binary_kl_temp_limit DistillKLDivLoss p_j
    _get_completion_lengths
    log_variance C_l p_i p_T t_end rho rho_i u_i F_i w_i G_i m_i tau_i
    layer_2 layer_10 layers_1 block_0 stage0 stage1_preact
    """.split()
)
ROOTS = {"jax": "jax", "jnp": "jax.numpy", "optax": "optax", "np": "numpy"}
# Frameworks that a reader may have; what is said of them is tested where they are used.
OTHERS = {"nn", "nnx", "eqx", "hk", "torch", "safetensors", "flax"}


def docstrings() -> Iterator[tuple[str, str]]:
    """`(where, text)` of every docstring."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
                name = getattr(node, "name", "")
                yield f"{path.relative_to(PACKAGE)} {name}", ast.get_docstring(node) or ""


def references(text: str) -> Iterator[str]:
    """`a.b` of every `a.b` or `a.b(...)` that stands alone in backticks on one line."""
    for span in re.findall(r"`([^`\n]+)`", text):
        match = DOTTED.fullmatch(span)
        if match:
            yield match[1]


def identifiers() -> set[str]:
    """Every name that the package's code uses or defines, its files, and words of its strings."""
    results = {part for path in FILES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            for field in ("id", "attr", "name", "arg"):
                value = getattr(node, field, None)
                if isinstance(value, str):
                    results |= set(value.split("."))
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and node.body:
                first: Any = node.body[0]
                if ast.get_docstring(node):
                    first.value = ast.Constant(None)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                results |= set(re.findall(r"\w+", node.value))
    return results


def exists(name: str) -> bool:
    """Whether a dotted name that begins with a module known here leads to something."""
    root, _, rest = name.partition(".")
    return leads_somewhere(f"{ROOTS.get(root, f'kdtl_jax.{root}')}.{rest}")


def test_names_in_docstrings_exist() -> None:
    known = identifiers() | set(dir(builtins)) | FOREIGN
    missing = [
        f"{where}: `{name}`"
        for where, text in docstrings()
        for name in references(text)
        if len(name) > 2 and name.split(".")[0] not in OTHERS and name.split(".")[-1] not in known
        if not (name.split(".")[0] in ROOTS and exists(name))
    ]
    assert not missing, "\n".join(missing)


def test_dotted_names_lead_somewhere() -> None:
    """`losses.kd_kl`, `jax.lax.scan`; those of pages are read by tests/test_docs_pages.py."""
    modules = {path.stem for path in PACKAGE.iterdir() if path.stem[0] not in "_."}
    missing = [
        f"{where}: `{name}`"
        for where, text in docstrings()
        for name in references(text)
        if "." in name and name.split(".")[0] in modules | ROOTS.keys()
        if name not in ("losses.f", "metrics.jsonl", "metrics.csv")  # a letter, files
        if not exists(name)
    ]
    assert not missing, "\n".join(missing)
