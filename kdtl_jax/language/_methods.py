"""Distillation of language models: each method as a function from a setup to a step.

    setup = language.Setup(student.model, optax.adamw(1e-4), teacher=teacher.model, prompt=64)
    learner = language.opd(setup)
    state = learner.begin(train.init_state(student.params, setup.tx, key=key))
    loop.run(learner.step, state, source, teacher.params, steps=1000)

| method | tokens | loss |
|---|---|---|
| `sft` | the data's | cross-entropy |
| `kd` | the data's | divergence, forward KL |
| `seqkd` | the teacher's | cross-entropy |
| `gkd` | the student's in a share of the steps, otherwise the data's | generalized JSD |
| `opd` | the student's | reverse KL, exact at every position |
| `opd_sampled` | the student's | reverse KL from the sampled tokens only |
| `minillm` | the student's | reverse KL of whole sequences |
| `self_` | the student's | reverse KL to the weights it started from, given a privileged prompt |
| `self_ema` | the student's | the same, with a teacher that follows the student |
| `qad` | the data's | forward KL of the quantized student to its full-precision self |
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from kdtl_jax import losses, train, trees
from kdtl_jax._types import ModelFn, Outputs, Params, PyTree, Scalar
from kdtl_jax.language import _rollouts, _terms
from kdtl_jax.language._terms import Divergence, Weights, as_they_are
from kdtl_jax.models import Decoder, segment_positions
from kdtl_jax.objective import TermsFn
from kdtl_jax.train import Step, TrainState, mean_teachers


class Setup(NamedTuple):
    """The arguments of a method.

    Attributes:
      student: the decoder to train.
      tx: the optimizer.
      teacher: the decoder of the step's `teacher_params`; None means the student's.
      weights: function from the trained parameters to the student's (see `model`).
      trainable: selector of the parameters to train.
      prompt: number of columns of the prompt, for methods that sample.
      divergence: the divergence to use; None means the method's own.
      vocabulary: the number of token ids, if the two tables differ in their padding: ids beyond it
        are neither sampled nor part of a distribution. None means all rows.
      task: weight of the cross-entropy with the data, added to a divergence on the data.
      share: share of GKD's steps that learn from the student's samples, in [0, 1].
      beta: the parameter of GKD's divergence.
      decay: decay of the teacher that follows the student (EMA).
      temperature, top_k, top_p, stop_tokens: options of sampling; losses are at temperature 1.
      microbatches: the number of parts that a batch is split into.
      chunk_size: number of tokens whose logits exist at a time.
    """

    student: Decoder
    tx: optax.GradientTransformation
    teacher: Decoder | None = None
    weights: Weights = as_they_are
    trainable: trees.Selector = trees.everything
    prompt: int = 0
    divergence: Divergence | None = None
    vocabulary: int | None = None
    task: float = 0.0
    share: float = 0.5
    beta: float = 0.5
    decay: float = 0.95
    temperature: Scalar = 1.0
    top_k: int | None = None
    top_p: Scalar | None = None
    stop_tokens: Sequence[int] = ()
    microbatches: int = 1
    chunk_size: int = _terms.CHUNK


class Learner(NamedTuple):
    """A method's step, and the function that makes its first state from `train.init_state`'s."""

    step: Step
    begin: Callable[[TrainState], TrainState] = lambda state: state


class LanguageMethod(NamedTuple):
    """A row of the table."""

    name: str
    title: str
    paper: str
    build: Callable[[Setup], Learner]
    samples: bool = False  # whether rows need a prompt
    teaches_itself: bool = False  # whether teacher_params are the weights it starts from


def sft(setup: Setup) -> Learner:
    """Fine-tuning on the data."""
    return Learner(_step(setup, _cross_entropy(setup), {"task": 1.0}, teacher=None))


def kd(setup: Setup) -> Learner:
    """A divergence from the teacher on the data, forward KL by default.

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (1503.02531).
    """
    return Learner(distilled(setup, _divergence(setup, losses.forward_kl), _teacher(setup)))


def seqkd(setup: Setup) -> Learner:
    """Fine-tuning on completions that the teacher samples in every step.

    References:
      Kim and Rush, Sequence-Level Knowledge Distillation, 2016 (1606.07947), who take the mode by
      beam search; large models are now distilled from samples.
    """
    step = _step(setup, _cross_entropy(setup), {"task": 1.0}, teacher=None)
    draw = _draw(setup, _teacher_decoder(setup))
    return Learner(_rollouts.on_samples(step, draw, _rollouts.of_teacher))


def gkd(setup: Setup) -> Learner:
    """Generalized JSD, on the student's samples in `share` of the steps and on the data in others.

    References:
      Agarwal et al., On-Policy Distillation of Language Models, 2023 (2306.13649).
    """
    terms = _divergence(setup, partial(losses.jsd_gkd, beta=setup.beta))
    return _on_own(setup, distilled(setup, terms, _teacher(setup)), share=setup.share)


def opd(setup: Setup) -> Learner:
    """`sum_v p_S (log p_S - log p_T)` at every position of the student's own samples.

    The sum over the vocabulary is exact and differentiated; the tokens are constants.

    References:
      Agarwal et al., On-Policy Distillation of Language Models, 2023 (2306.13649). This is their
      GKD with the reverse KL and samples in every step.
    """
    terms = _divergence(setup, losses.reverse_kl)
    return _on_own(setup, _step(setup, terms, {"kd": 1.0}, teacher=_teacher(setup)))


def opd_sampled(setup: Setup) -> Learner:
    """`opd` from only the log-probabilities of the sampled tokens: unbiased, with more
    variance."""
    terms = _terms.sampled_reverse_kl(chunk_size=setup.chunk_size)
    step = _step(setup, terms, {"kd": 1.0}, teacher=_teacher(setup))
    return _on_own(setup, step)


def minillm(setup: Setup) -> Learner:
    """Reverse KL of whole sequences: a token's effect on later tokens counts too.

    References:
      Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2023 (2306.08543).
    """
    terms = _terms.together(
        _divergence(setup, losses.reverse_kl), _terms.policy_gradient(chunk_size=setup.chunk_size)
    )
    step = _step(setup, terms, {"kd": 1.0, "long": 1.0}, teacher=_teacher(setup))
    return _on_own(setup, step)


def self_(setup: Setup) -> Learner:
    """Reverse KL, on the student's samples, to its own initial weights given a privileged prompt.

    `inputs["privileged"]` holds `tokens` and `segments` `[B, P']` of the teacher's prompt, at least
    as wide as the student's and padded on the left.

    References:
      Zhao et al., Self-Distilled Reasoner (OPSD), 2026 (2601.18734), whose code uses the JSD at
      beta 0.5; Shenfeld et al., Self-Distillation Enables Continual Learning (SDFT), 2026
      (2601.19897), which states the reverse KL.
    """
    terms = _divergence(setup, losses.reverse_kl)
    teacher = _itself(setup, as_they_are)
    return _on_own(setup, _step(setup, terms, {"kd": 1.0}, teacher=teacher))


def self_ema(setup: Setup) -> Learner:
    """`self_` with the student's moving average as the teacher. It takes no `teacher_params`."""
    terms = _divergence(setup, losses.reverse_kl)
    step = _step(setup, terms, {"kd": 1.0}, teacher=_itself(setup, setup.weights))
    step = mean_teachers.follow(step, decay=setup.decay)
    return _on_own(setup, step)._replace(begin=mean_teachers.begin)


def qad(setup: Setup) -> Learner:
    """Forward KL to the teacher of a student with quantized weights (`setup.weights`).

    References:
      Xin et al., Quantization-Aware Distillation for NVFP4 Inference Accuracy Recovery, 2026
      (2601.20088).
    """
    return kd(setup)


def methods() -> tuple[LanguageMethod, ...]:
    """The table of methods."""
    return (
        LanguageMethod("sft", "Fine-tuning", "", sft),
        LanguageMethod("kd", "Distillation on the data", "1503.02531", kd),
        LanguageMethod("seqkd", "Sequence-level distillation", "1606.07947", seqkd, True),
        LanguageMethod("gkd", "Generalized distillation", "2306.13649", gkd, True),
        LanguageMethod("opd", "On-policy distillation", "2306.13649", opd, True),
        LanguageMethod("opd_sampled", "On-policy, sampled", "2306.13649", opd_sampled, True),
        LanguageMethod("minillm", "MiniLLM", "2306.08543", minillm, True),
        LanguageMethod("self", "Self-distillation", "2601.18734", self_, True, True),
        LanguageMethod("self_ema", "Self-distillation, EMA", "2601.19897", self_ema, True, True),
        LanguageMethod("qad", "Quantization-aware distillation", "2601.20088", qad),
    )


def privileged(teacher: ModelFn, prompt: int) -> ModelFn:
    """The teacher on its own prompt with the student's completion; outputs in the student's places.

    Args:
      teacher: from `model`.
      prompt: P, the number of columns of the student's prompt.

    Returns:
      A model function of inputs with an entry `"privileged"`; from the prompt's last column on, its
      hidden states and taps `[B, L, width]` are at the same positions as the student's.

    Raises:
      ValueError: when called, if the privileged prompt is narrower than the student's.
    """

    def apply(
        params: Params, model_state: PyTree, inputs: Any, *, key: Any = None, train: bool = False
    ) -> tuple[Outputs, PyTree]:
        prompts, width = inputs["privileged"], inputs["privileged"]["tokens"].shape[1]
        if width < prompt:
            raise ValueError(
                f"the privileged prompt must have at least the prompt's {prompt} columns, got "
                f"{width}. Pad it on the left, with segment 0."
            )

        teacher_inputs = {
            name: jnp.concatenate([prompts[name], inputs[name][:, prompt:]], axis=1)
            for name in ("tokens", "segments")
        }
        teacher_inputs["positions"] = segment_positions(teacher_inputs["segments"])
        outputs, model_state = teacher(params, model_state, teacher_inputs)
        aligned = {n: x if n == "head" else x[:, width - prompt :] for n, x in outputs.items()}
        return aligned, model_state

    return apply


def _step(setup: Setup, terms: TermsFn, weights: Any, *, teacher: ModelFn | None) -> Step:
    return train.make_step(
        _terms.model(_student_decoder(setup), setup.weights),
        terms,
        weights,
        setup.tx,
        teacher=teacher,
        trainable=setup.trainable,
        microbatches=setup.microbatches,
    )


def distilled(setup: Setup, terms: TermsFn, teacher: ModelFn | None) -> Step:
    """A step of `"kd"` terms, and of the cross-entropy with the data if that has a weight."""
    if not setup.task:
        return _step(setup, terms, {"kd": 1.0}, teacher=teacher)
    both = _terms.together(terms, _rollouts.of_data(_cross_entropy(setup)))
    return _step(setup, both, {"kd": 1.0, "task": setup.task}, teacher=teacher)


def _divergence(setup: Setup, default: Divergence) -> TermsFn:
    return _terms.divergence(setup.divergence or default, chunk_size=setup.chunk_size)


def _cross_entropy(setup: Setup) -> TermsFn:
    return _terms.cross_entropy(chunk_size=setup.chunk_size)


def _student_decoder(setup: Setup) -> Decoder:
    return within_vocabulary(setup.student, setup.vocabulary)


def _teacher_decoder(setup: Setup) -> Decoder:
    return within_vocabulary(setup.teacher or setup.student, setup.vocabulary)


def within_vocabulary(decoder: Decoder, size: int | None) -> Decoder:
    """The decoder without the padding of its table: its head has the first `size` tokens."""
    if size is None:
        return decoder
    if not 0 < size <= decoder.config.vocabulary:
        raise ValueError(
            f"vocabulary must lie in 1..{decoder.config.vocabulary}, the rows of a table, got "
            f"{size}."
        )

    def head(params: Params) -> losses.Head:
        head = decoder.head(params)
        bias = None if head.bias is None else head.bias[:size]
        delta = head.delta and (head.delta[0], head.delta[1][:, :size])
        return head._replace(kernel=head.kernel[:, :size], bias=bias, delta=delta)

    return decoder._replace(head=head)


def _teacher(setup: Setup) -> ModelFn:
    return _terms.model(_teacher_decoder(setup))


def _itself(setup: Setup, weights: Weights) -> ModelFn:
    """The student as its own teacher, with a privileged prompt."""
    return privileged(_terms.model(_student_decoder(setup), weights), setup.prompt)


def _on_own(setup: Setup, step: Step, *, share: float = 1.0) -> Learner:
    """Learning from the student's samples in `share` of the steps."""
    draw = _draw(setup, _student_decoder(setup))
    return Learner(
        _rollouts.on_samples(step, draw, lambda s, _: setup.weights(s.params), share=share)
    )


def _draw(setup: Setup, decoder: Decoder) -> _rollouts.Rollout:
    return _rollouts.rollout(
        decoder,
        prompt=setup.prompt,
        temperature=setup.temperature,
        top_k=setup.top_k,
        top_p=setup.top_p,
        stop_tokens=setup.stop_tokens,
    )
