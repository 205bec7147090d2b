"""Language models: text, packing, sampling, and the methods that distill them.

Decoders themselves are in `kdtl_jax.models`, their losses in `kdtl_jax.losses`.
"""

from kdtl_jax.language._alignment import align_tokens as align_tokens
from kdtl_jax.language._alignment import chunk_lengths as chunk_lengths
from kdtl_jax.language._alignment import chunk_log_probs as chunk_log_probs
from kdtl_jax.language._alignment import merge_chunks as merge_chunks
from kdtl_jax.language._alignment import merge_tokens as merge_tokens
from kdtl_jax.language._alignment import require_same_ids as require_same_ids
from kdtl_jax.language._alignment import shared_ids as shared_ids
from kdtl_jax.language._chat import Chat as Chat
from kdtl_jax.language._chat import chat as chat
from kdtl_jax.language._chat import chat_prompt as chat_prompt
from kdtl_jax.language._chat import chat_text as chat_text
from kdtl_jax.language._measures import Fidelity as Fidelity
from kdtl_jax.language._measures import fidelity as fidelity
from kdtl_jax.language._methods import LanguageMethod as LanguageMethod
from kdtl_jax.language._methods import Learner as Learner
from kdtl_jax.language._methods import Setup as Setup
from kdtl_jax.language._methods import gkd as gkd
from kdtl_jax.language._methods import kd as kd
from kdtl_jax.language._methods import methods as methods
from kdtl_jax.language._methods import minillm as minillm
from kdtl_jax.language._methods import opd as opd
from kdtl_jax.language._methods import opd_sampled as opd_sampled
from kdtl_jax.language._methods import privileged as privileged
from kdtl_jax.language._methods import qad as qad
from kdtl_jax.language._methods import self_ as self_
from kdtl_jax.language._methods import self_ema as self_ema
from kdtl_jax.language._methods import seqkd as seqkd
from kdtl_jax.language._methods import sft as sft
from kdtl_jax.language._rollouts import Rollout as Rollout
from kdtl_jax.language._rollouts import of_data as of_data
from kdtl_jax.language._rollouts import of_student as of_student
from kdtl_jax.language._rollouts import of_teacher as of_teacher
from kdtl_jax.language._rollouts import on_samples as on_samples
from kdtl_jax.language._rollouts import rollout as rollout
from kdtl_jax.language._sampling import Samples as Samples
from kdtl_jax.language._sampling import Sequences as Sequences
from kdtl_jax.language._sampling import joined as joined
from kdtl_jax.language._sampling import sample as sample
from kdtl_jax.language._sampling import sampling_log_probs as sampling_log_probs
from kdtl_jax.language._terms import as_they_are as as_they_are
from kdtl_jax.language._terms import cross_entropy as cross_entropy
from kdtl_jax.language._terms import divergence as divergence
from kdtl_jax.language._terms import model as model
from kdtl_jax.language._terms import next_tokens as next_tokens
from kdtl_jax.language._terms import policy_gradient as policy_gradient
from kdtl_jax.language._terms import sampled_reverse_kl as sampled_reverse_kl
from kdtl_jax.language._terms import together as together
from kdtl_jax.language._tokenizer import Tokenizer as Tokenizer
from kdtl_jax.language._tokenizer import byte_tokenizer as byte_tokenizer
from kdtl_jax.language._tokenizer import tokenizer as tokenizer
from kdtl_jax.language._tokenizer import write_byte_tokenizer as write_byte_tokenizer
