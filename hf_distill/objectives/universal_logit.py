"""UniversalLogitMatch: agreement of predictions over different vocabularies: how sure both are, not of which token."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_distill.errors import DataError, SettingError
from hf_distill.functional.divergences import sorted_distance
from hf_distill.functional.rows import in_full_precision
from hf_distill.models.packing import may_be_packed
from hf_distill.objectives.base import Objective, ObjectiveSetup
from hf_distill.objectives.layers import checked_weight
from hf_distill.schedules import Schedule, checked_schedule
from hf_distill.signals import LossSum, Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import IGNORED, TEACHER_PREFIX, attended, rows_of


class UniversalLogitMatch(Objective):
    """T · the distance of the sorted probabilities of the k-th answer tokens of student and teacher.

    For a teacher with another tokenizer, which reads `teacher_*` columns: use alpha=0 (or None), since the logits' term
    compares token with token. `teacher_labels` mark the teacher's answer. If the answers differ in length, the end of
    the longer one is left out, and so is a token that one side cannot predict (the first of a text). The first token of
    a text is not part of the answer if it is its model's `bos_token_id`. Without `teacher_*` columns both models read
    the same batch.

    Boizard et al. 2024, section 3, add 1.5 times this to the cross-entropy of the labels. Their formula sums over an
    answer, and their code takes the mean of each answer and then of the answers; here it is the mean over all pairs of
    the optimizer step, so that all tokens weigh the same. There T is in the softmax only.

    Args:
        weight: weight of the term, a number or a schedule.
        temperature: softens both; the factor T keeps the gradient from shrinking.
        name: name of the term.

    Raises:
        SettingError: for a weight below 0 or a temperature of 0 or less, or, in `bind`, a head that writes no text.
        DataError: when counted, if the teacher's answers cannot be found.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_distill import Distiller
    >>> shape = dict(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> student, teacher = (LlamaForCausalLM(LlamaConfig(vocab_size=size, **shape)) for size in (9, 12))
    >>> distiller = Distiller(student, teacher, alpha=0, objectives=UniversalLogitMatch(weight=1.5))
    >>> ids, theirs = torch.tensor([[1, 5, 6]]), torch.tensor([[1, 7, 8, 9]])
    >>> batch = {"input_ids": ids, "labels": ids, "teacher_input_ids": theirs, "teacher_labels": theirs}
    >>> sorted(distiller(student, batch).terms)
    ['labels', 'universal_logit']
    """

    paper = "boizard2024universal"
    needs = teacher_needs = Needs(logits=True)

    def __init__(
        self,
        *,
        weight: float | Schedule = 1.0,
        temperature: float | Schedule = 1.0,
        name: str = "universal_logit",
    ) -> None:
        self.weight = checked_weight(type(self).__name__, weight)
        self.temperature = checked_schedule("temperature", temperature)
        self.name = name
        self._starts: tuple[int | None, int | None] = (None, None)

    def bind(self, setup: ObjectiveSetup) -> None:
        if not setup.task.generates:
            raise SettingError(f"UniversalLogitMatch is for causal_lm and seq2seq, not for {setup.task}.")
        self._starts = (setup.student.start_token, None if setup.teacher is None else setup.teacher.start_token)

    def count(self, task: Task, batch: Batch) -> Tensor:
        return self._paired(task, batch, self._teachers(task, batch))[0].sum()

    def __call__(
        self, student: Signals, teacher: Signals, task: Task, batch: Batch, *, progress: float = 0.0
    ) -> LossSum:
        theirs = self._teachers(task, batch)
        ours_paired, theirs_paired = self._paired(task, batch, theirs)
        q = _paired_rows(student.predictions(), task, batch, ours_paired, whose="student")
        p = _paired_rows(teacher.predictions(), task, theirs, theirs_paired, whose="teacher")
        t = self.temperature(progress)
        found = sorted_distance(in_full_precision(q) / t, in_full_precision(p) / t)
        return LossSum(t * found.sum(), ours_paired.sum())

    def _paired(self, task: Task, batch: Batch, theirs: Batch) -> tuple[Tensor, Tensor]:
        """Return bool masks `[b r]` of the rows of both sides that have a row on the other side, in the same order."""
        numbers = [_numbered(task, of, start) for of, start in zip((batch, theirs), self._starts, strict=True)]
        width = 1 + max(int(number.shape[1]) for number in numbers) + 1
        there = [torch.zeros(len(n), width, dtype=torch.bool, device=n.device).scatter_(1, n, True) for n in numbers]
        both = there[0] & there[1]
        both[:, 0] = False
        ours_paired, theirs_paired = (both.gather(1, number) for number in numbers)
        return ours_paired, theirs_paired

    def _teachers(self, task: Task, batch: Batch) -> Batch:
        """Return the batch as the teacher reads it."""
        columns = {name.removeprefix(TEACHER_PREFIX): x for name, x in batch.items() if name.startswith(TEACHER_PREFIX)}
        own = {name: x for name, x in columns.items() if not name.startswith("cached_")}
        if not own:
            return batch
        if may_be_packed(batch):
            raise DataError("the student's texts may be packed, so the teacher's cannot be paired. Use padding.")
        if task.has_decoder and (own.get("labels") is None or own.get("decoder_input_ids") is None):
            raise DataError(
                "a sequence-to-sequence teacher with another tokenizer needs its own teacher_labels and "
                f"teacher_decoder_input_ids; the batch has {sorted(batch)}."
            )
        if own.get("labels") is None and _has_prompt(batch):
            raise DataError(
                "the labels leave out prompts, but the teacher's prompts are not known. Add a column teacher_prompt to "
                "teacher_text (its beginning), or teacher_labels to teacher_input_ids."
            )
        return own

    def __repr__(self) -> str:
        return f"{type(self).__name__}(temperature={self.temperature(0.0):g})"


def _paired_rows(predictions: Tensor, task: Task, batch: Batch, paired: Tensor, *, whose: str) -> Tensor:
    """Return the rows `[m v]` that are paired.

    Raises:
        DataError: if the model predicts at other positions than its batch has.
    """
    rows = rows_of(predictions, task, batch, whose=whose)
    if rows.shape[0] != paired.numel():
        raise DataError(
            f"the {whose} gives {rows.shape[0]} rows, its batch has {paired.shape[0]} × {paired.shape[1]}. Use no "
            "virtual tokens of prompt tuning, and labels as long as the input."
        )
    return rows.index_select(0, paired.flatten().nonzero().squeeze(-1))


def _has_prompt(batch: Batch) -> bool:
    """Return whether an attended token, except the first, has no label."""
    if batch.get("labels") is None:
        return False
    read = attended(batch, "attention_mask", ("input_ids", "inputs_embeds"))
    return bool((read[:, :-1] & read[:, 1:] & (batch["labels"][:, 1:] == IGNORED)).any())


def _numbered(task: Task, batch: Batch, start: int | None) -> Tensor:
    """Return for each row `[b r]` the number of the answer token that it predicts, from 1; 0 if it is not valid."""
    keep, labels, causal = task.keep(batch), batch.get("labels"), task.shifts_labels
    assert keep is not None  # tasks over a vocabulary have one
    like = next(batch[name] for name in ("labels", "input_ids", "decoder_input_ids") if batch.get(name) is not None)
    keep = keep.view(like.shape[0], -1)
    if batch.get("shift_labels") is not None or (labels is None and not causal):
        return keep.cumsum(1) * keep
    read = attended(batch, "attention_mask", ("input_ids", "inputs_embeds")) if causal else like != IGNORED
    answer = read if labels is None else like != IGNORED  # labels come first in `like`
    written = batch.get("input_ids") if causal else labels
    if start is not None and written is not None:
        answer = answer & ~(read & (read.cumsum(1) == 1) & (written == start))
    number = answer.cumsum(1) * answer
    return number[:, 1:] * keep if causal else number * keep
