"""Methods to transfer a source model's weights to a target task, as data.

A method defines the parameters (the model's, or `{"base", "adapter"}` for LoRA), which of them are
trainable, whether the source's head is trained too, the penalty added to the task, and how to
obtain a plain model at the end.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import discrepancies, losses, penalties, transferability, transforms, trees
from kdtl_jax._types import ModelFn, Outputs, Params, PyTree, Variables
from kdtl_jax.interop.networks import Network
from kdtl_jax.objective import Inputs
from kdtl_jax.train import finetune

HEADS = ("head", "distillation_head")  # DeiT has both
HEAD, BODY = "(distillation_)?head/.*", "(?!(distillation_)?head/).*"


class Case(NamedTuple):
    """The inputs of a method: one seed's models and training set."""

    net: Network
    begin: Variables  # initial variables: new, or `copied`
    copied: Variables  # the source's body under a new head
    source_head: Mapping[str, Array] | None  # kernel [width, source classes], bias
    data: Mapping[str, Array]  # inputs and labels of the target's training set
    classes: int
    steps: int


class TransferMethod(NamedTuple):
    """A transfer method; the defaults are those of plain fine-tuning."""

    name: str
    label: str
    paper: str
    is_copied: bool = True
    needs_source_head: bool = False  # trained along with the model
    needs_classes: bool = False  # of the target
    needs_head: bool = False  # a top-level module of the model with a name in `HEADS`
    needs_features: bool = False  # outputs of the model beside its logits
    needs_last: bool = False  # the head's input among them
    trainable: trees.Selector = trees.everything
    strengths: tuple[float, ...] = ()  # weights of the extra term `term` to choose from
    term: str = ""
    start: Callable[[Params, Array], Params] = lambda params, key: params
    apply: Callable[[Case], ModelFn] = lambda case: case.net.apply
    record: Callable[[Case], Mapping[str, Any]] = lambda case: {}  # arrays [N, ...] for batches
    penalty: Callable[[Case], Callable[[Inputs], Array]] | None = None
    gate: Callable[[Case, Params], optax.GradientTransformation] | None = None
    finish: Callable[[Params], Params] = lambda params: params


def modules_by_depth(params: Params) -> list[str]:
    """The model's top-level modules from the input to the head."""

    def rank(name: str) -> tuple[int, Any]:
        if name.startswith(("stem", "embed", "pos", "cls")):
            return 0, trees.natural_key(name)
        if name in HEADS:
            return 3, trees.natural_key(name)
        return (2 if "norm" in name or name == "pooler" else 1), trees.natural_key(name)

    return sorted(params, key=rank)


def by_depth(params: Params, optimized: Params, decay: float) -> optax.GradientTransformation:
    """Layer-wise learning-rate decay, per module of the plain model.

    The optimizer's tree may have more leaves, which keep factor 1.
    """
    names = modules_by_depth(params)

    def depth(path: str, leaf: Any) -> int:
        parts = [part for part in path.split("/") if part not in ("params", "base", "adapter")]
        is_outside = path.startswith("connectors/") or parts[0] not in names
        return len(names) - 1 if is_outside else names.index(parts[0])

    depths = trees.map_with_path(depth, optimized)
    return finetune.scale_by_multipliers(finetune.layer_decay(depths, decay=decay))


def _unfreeze_gradually(case: Case, params: Params) -> optax.GradientTransformation:
    """Unfreezes modules from the top at equal intervals, until all are trained after half."""
    names = modules_by_depth(params)
    pause = max(1, case.steps // 2 // max(1, len(names) - 1))
    rules = [(f"{name}(/.*)?", pause * i) for i, name in enumerate(reversed(names))]
    return finetune.unfreeze_gate(params, rules)


def _source_logits(case: Case) -> Array:
    """The source model's outputs on the target's training set."""
    outputs, _ = case.net.apply(*case.copied, case.data["inputs"])
    assert case.source_head is not None  # methods that need one are refused without it
    return head_logits(outputs[case.net.layout.last], case.source_head)


def head_logits(features: Array, head: Mapping[str, Array]) -> Array:
    """Logits of a linear head."""
    return features @ head["kernel"] + head["bias"][None]


def _feature_penalty(
    loss: Callable[[Array, Array], Array],
) -> Callable[[Case], Callable[[Inputs], Array]]:
    """`sum over taps of loss(features, the source's features)`."""

    def make_penalty(case: Case) -> Callable[[Inputs], Array]:
        def penalty(x: Inputs) -> Array:
            taps = case.net.layout.features
            values = [loss(x.student[tap], x.batch["source"][tap]) for tap in taps]
            return jnp.sum(jnp.stack(values), axis=0)

        return penalty

    return make_penalty


def _record_features(case: Case) -> Mapping[str, Any]:
    outputs, _ = case.net.apply(*case.copied, case.data["inputs"])
    return {"source": {tap: outputs[tap] for tap in case.net.layout.features}}


def _behavioral(student: Array, source: Array) -> Array:
    return 0.5 * losses.squared_distance(student, source)


def _bss(case: Case) -> Callable[[Inputs], Array]:
    return lambda x: discrepancies.bss(x.student[case.net.layout.last], where=x.real)


def _relation(case: Case) -> Mapping[str, Any]:
    labels = case.data["labels"]
    relation = transferability.category_relation(
        jax.nn.softmax(_source_logits(case)), labels, num_classes=case.classes
    )
    return {"related": relation[labels]}


def _co_tuning(case: Case) -> Callable[[Inputs], Array]:
    def penalty(x: Inputs) -> Array:
        logits = head_logits(x.student[case.net.layout.last], x.connectors["source_head"])
        return losses.co_tuning(logits, x.batch["related"])

    return penalty


def _lwf(case: Case) -> Callable[[Inputs], Array]:
    """T = 2, as in Li and Hoiem."""

    def penalty(x: Inputs) -> Array:
        logits = head_logits(x.student[case.net.layout.last], x.connectors["source_head"])
        return losses.forward_kl(logits, x.batch["recorded"], temperature=2.0)

    return penalty


def _bi_tuning(case: Case) -> Callable[[Inputs], Array]:
    def penalty(x: Inputs) -> Array:
        head = jax.lax.stop_gradient(x.params["head"])
        return losses.bi_tuning_classifier(
            x.student[case.net.layout.last],
            x.batch["labels"],
            class_weights=head["kernel"],
            class_bias=head["bias"],
            where=x.real,
        )

    return penalty


_lora = transforms.lora(rank=8, alpha=8.0)


def _lora_start(params: Params, key: Array) -> Params:
    def is_kernel(path: str, leaf: Any) -> bool:
        return jnp.ndim(leaf) >= 2 and path.split("/")[0] not in HEADS

    base, weights = _lora.init(key, params, where=is_kernel)
    return {"base": base, "adapter": weights}


def _merged(params: Params) -> Params:
    return _lora.merge(params["base"], params["adapter"])


def _on_changed_params(
    change: Callable[[Case, Params, Array | None], tuple[Params, Array | None]],
) -> Callable[[Case], ModelFn]:
    """The network with `change` applied to its parameters.

    The change receives a key only in training, and returns the key that remains.
    """

    def make_model(case: Case) -> ModelFn:
        def run(
            params: Params,
            model_state: PyTree,
            inputs: Any,
            *,
            key: Array | None = None,
            train: bool = False,
        ) -> tuple[Outputs, PyTree]:
            new_params, next_key = change(case, params, key if train else None)
            next_key = next_key if train else key
            return case.net.apply(new_params, model_state, inputs, key=next_key, train=train)

        return run

    return make_model


def _mixout(case: Case, params: Params, key: Array | None) -> tuple[Params, Array | None]:
    if key is None:
        return params, None
    key, draw = jax.random.split(key)
    body = {name: leaf for name, leaf in params.items() if name not in HEADS}
    source = {name: case.copied.params[name] for name in body}
    return {**params, **transforms.mixout(draw, body, source, rate=0.5)}, key


METHODS: tuple[TransferMethod, ...] = (
    TransferMethod("scratch", "From scratch", "", is_copied=False),
    TransferMethod(
        "copied_head_only", "Copied, head only", "linear probe", needs_head=True, trainable=HEAD
    ),
    TransferMethod("copied_finetuned", "Copied, all fine-tuned", ""),
    TransferMethod(
        "copied_l2_sp", "Copied, fine-tuned with L2-SP", "Li et al., 1802.01483",
        strengths=(1e-3, 1e-2, 1e-1), term="l2_sp",
        penalty=lambda case: lambda x: penalties.l2_sp(x.params, case.copied.params, where=BODY),
    ),
    TransferMethod(
        "lp_ft", "Head first, then all (LP-FT)", "Kumar et al., 2202.10054", needs_head=True,
        gate=lambda case, params: finetune.lp_ft(params, head=HEAD, probe_steps=case.steps // 2),
    ),
    TransferMethod(
        "gradual_unfreezing", "Unfrozen from the top", "Howard and Ruder, 1801.06146",
        gate=_unfreeze_gradually,
    ),
    TransferMethod(
        "bitfit", "Biases and head alone (BitFit)", "Ben Zaken et al., 2106.10199",
        needs_head=True, trainable=f"{HEAD}|.*bias",
    ),
    TransferMethod(
        "lora", "LoRA of rank 8, and the head", "Hu et al., 2106.09685",
        needs_head=True, trainable=f"adapter/.*|base/{HEAD}",
        start=_lora_start, finish=_merged,
        apply=_on_changed_params(lambda case, params, key: (_merged(params), key)),
    ),
    TransferMethod(
        "behavioral", "Features kept near the source's", "Li et al., 1901.09229",
        strengths=(1e-3, 1e-2, 1e-1), term="behavioral", record=_record_features,
        needs_features=True,
        penalty=_feature_penalty(_behavioral),
    ),
    TransferMethod(
        "delta", "DELTA, channels weighted equally", "Li et al., 1901.09229",
        strengths=(1e-3, 1e-2, 1e-1), term="delta", record=_record_features,
        needs_features=True,
        penalty=_feature_penalty(losses.delta),
    ),
    TransferMethod(
        "bss", "Batch spectral shrinkage", "Chen et al., NeurIPS 2019",
        strengths=(1e-4, 1e-3, 1e-2), term="bss", penalty=_bss, needs_last=True,
    ),
    TransferMethod(
        "co_tuning", "Co-Tuning, direct relation", "You et al., NeurIPS 2020",
        needs_source_head=True, needs_classes=True, needs_last=True,
        strengths=(0.1, 1.0, 2.3), term="co_tuning",
        record=_relation, penalty=_co_tuning,
    ),
    TransferMethod(
        "lwf", "Learning without forgetting", "Li and Hoiem, 1606.09282",
        needs_source_head=True, needs_last=True,
        strengths=(0.1, 1.0, 4.0), term="lwf",
        record=lambda case: {"recorded": _source_logits(case)}, penalty=_lwf,
    ),
    TransferMethod(
        "bi_tuning", "Bi-Tuning's classifier part", "Zhong et al., 2011.06182",
        needs_classes=True, needs_head=True, needs_last=True,
        strengths=(0.1, 1.0), term="bi_tuning", penalty=_bi_tuning,
    ),
    TransferMethod(
        "mixout", "Mixout, half of the weights", "Lee et al., 1909.11299", needs_head=True,
        apply=_on_changed_params(_mixout),
    ),
)  # fmt: skip
BY_NAME = {method.name: method for method in METHODS}
DEFAULT = (
    "scratch", "copied_head_only", "copied_finetuned", "copied_l2_sp", "lp_ft", "lora", "delta",
    "bss", "co_tuning", "lwf",
)  # fmt: skip
