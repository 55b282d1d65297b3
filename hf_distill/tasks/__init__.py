"""Kinds of heads: where each keeps its predictions, and which of their rows count."""

from hf_distill.tasks.base import Batch, Task
from hf_distill.tasks.classification import Classification, MultipleChoice, TokenClassification
from hf_distill.tasks.ctc import CTC
from hf_distill.tasks.infer import TASKS, infer_task, make_task
from hf_distill.tasks.language import CausalLM, MaskedLM, Seq2Seq
from hf_distill.tasks.regression import Embedding, Regression
from hf_distill.tasks.span import Span

__all__ = [
    "CTC",
    "TASKS",
    "Batch",
    "CausalLM",
    "Classification",
    "Embedding",
    "MaskedLM",
    "MultipleChoice",
    "Regression",
    "Seq2Seq",
    "Span",
    "Task",
    "TokenClassification",
    "infer_task",
    "make_task",
]
