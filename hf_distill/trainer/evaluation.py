"""Evaluation in several processes counts each example once, as in one process.

Accelerate fills up the last batches with copies of the first examples. `Trainer` removes them from the gathered
predictions, but the loss of a batch is still the mean over its copies too; `Seq2SeqTrainer` removes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import EvalPrediction, Seq2SeqTrainer
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import has_length

from hf_distill._types import Batch, Example, Keywords
from hf_distill.distiller import Distiller
from hf_distill.errors import TeacherError
from hf_distill.finite import ADVICE, is_nan_or_inf
from hf_distill.models.packing import PackingCheck
from hf_distill.objectives.logits import RowValues
from hf_distill.signals import Needs, Outputs, Signals
from hf_distill.tasks.base import batch_size
from hf_distill.tasks.infer import unwrapped

if TYPE_CHECKING:
    from hf_distill.trainer.mixin import DistillationMixin

logger = logging.getLogger(__name__)
# What `prediction_step` returns: loss, predictions (those of several heads as a tuple) and labels.
Prediction: TypeAlias = tuple[Any, Any, Any]
Gather: TypeAlias = Callable[[Any], Any]  # gathers nested tensors over the processes


class EachOnce:
    """Replaces `Trainer.gather_function`: gathers values of the real examples and leaves out the copies.

    If a process has nothing but copies in the last batch, it still computes them, because the other processes wait for
    it in every collective operation.

    Args:
        counted: counts the examples as they are read; None if Accelerate knows how many there are.
        whole_batches: whether each batch's loss has the weight of a whole batch, as with `Seq2SeqTrainer` in one
            process, rather than the weight of its examples.
    """

    def __init__(self, accelerator: Accelerator, counted: Counted | None, *, whole_batches: bool) -> None:
        self._accelerator = accelerator
        self._whole_batches = whole_batches
        self._counted = counted
        self._examples = 0  # in this process's part of the batch, copies included
        self._real: list[int] = []  # of each process, without copies
        self._computed = 0  # the number of examples whose values are gathered
        self._loss_is_next = False
        self._warned = False

    def begin(self, batch: Batch) -> None:
        """Remove the copies from this process's part of a batch, in place."""
        self._examples = self._computed = batch_size(batch)
        processes, real = self._accelerator.num_processes, self._real_examples()
        starts = range(0, processes * self._examples, self._examples)
        self._real = [self._examples if real is None else min(max(0, real - s), self._examples) for s in starts]
        kept = self._real[self._accelerator.process_index]
        if not 0 < kept < self._examples:
            return
        tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.dim() > 0}
        if isinstance(batch, MutableMapping) and all(x.shape[0] == self._examples for x in tensors.values()):
            batch.update({name: x[:kept] for name, x in tensors.items()})
            self._computed = kept
        elif not self._warned:
            self._warned = True
            logger.warning(
                f"In the last batch of the evaluation {self._examples - kept} of {self._examples} examples fill it up. "
                f"They cannot be taken out of {sorted(batch)}, so they are part of the mean loss of that batch."
            )

    def _real_examples(self) -> int | None:
        """Return the number of real examples of this step over all processes, or None if all are real."""
        state = self._accelerator.gradient_state
        if not state.end_of_dataloader:
            return None
        whole = self._examples * self._accelerator.num_processes
        remainder = state.remainder if self._counted is None else self._counted.seen % whole
        return remainder if remainder > 0 else None

    def loss_is_next(self) -> None:
        """Announce that the next gathered tensor is the loss of the batch, repeated for each example."""
        self._loss_is_next = True

    def __call__(self, found: Any) -> Any:
        """Gather a tensor, or a nested structure of tensors, over the processes without the copies."""
        if not self._real:  # a subclass's prediction step did not call ours
            return self._accelerator.gather_for_metrics(found)
        if self._loss_is_next:
            self._loss_is_next = False
            return self._losses(found)
        if all(real == self._examples for real in self._real):
            return self._accelerator.gather(found)
        return recursively_apply(self._rows, found)

    def _losses(self, losses: Tensor) -> Tensor:
        of_processes = self._accelerator.gather(losses[:1])
        times = [len(losses) * (real > 0) if self._whole_batches else real for real in self._real]
        return of_processes.repeat_interleave(torch.tensor(times, device=of_processes.device))

    def _rows(self, x: Tensor) -> Tensor:
        """Return the rows of the real examples, for a tensor with the same number of rows for each example."""
        if x.dim() == 0 or x.shape[0] == 0 or x.shape[0] % self._computed:
            return self._accelerator.gather(x)
        each = x.shape[0] // self._computed
        filled = x.new_zeros((each * self._examples, *x.shape[1:]))
        filled[: x.shape[0]] = x
        parts = self._accelerator.gather(filled).split(each * self._examples)
        return torch.cat([part[: each * real] for part, real in zip(parts, self._real, strict=True)])


class Counted(IterableDataset):
    """Counts the examples of a dataset while they are read."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.seen = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Example]:
        self.seen = 0
        for example in self._dataset:
            self.seen += 1
            yield example


@contextlib.contextmanager
def examples_counted(dataloader: DataLoader) -> Iterator[Counted | None]:
    """Count the examples of a dataset that every process reads for itself (`dispatch_batches=False`).

    Return None if one process reads for all, since Accelerate then knows the number of copies itself.
    """
    shard = getattr(dataloader, "dataset", None)
    if not isinstance(shard, IterableDatasetShard):
        yield None
        return
    if dataloader.num_workers > 0:
        logger.warning(
            "This dataset has no length and is read by worker processes, so how many examples fill up the last batches "
            "of the evaluation is not known: they are counted. Set dataloader_num_workers=0, or leave "
            "dispatch_batches to its default."
        )
        yield None
        return
    original, shard.dataset = shard.dataset, Counted(shard.dataset)
    try:
        yield shard.dataset
    finally:
        shard.dataset = original


SURE = 2.0  # standard errors
# Errors that a function written for the student's outputs may raise on the teacher's.
_METRIC_ERRORS = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError)


class TeacherMetrics:
    """Compares student and teacher over the real examples of an evaluation.

    `teacher_agreement` is the share of valid rows for which both predict the same class (left out for values, which
    have no class). `divergence` is the mean over the valid rows at the final temperature of the training, including
    its factor.

    Args:
        gather: gathers values of examples over the processes.
    """

    def __init__(self, gather: Gather) -> None:
        self._gather = gather
        # divergence, agreeing rows, rows; labelled rows, right by the teacher, by the student alone, by it alone
        self._sums = torch.zeros(7, dtype=torch.float64)
        self._examples = 0  # over all processes

    def add(self, distiller: Distiller, outputs: Outputs, batch: Batch) -> Signals:
        """Compare the outputs for a batch, and return the teacher's predictions.

        Raises:
            TeacherError: if a prediction of the teacher is NaN or inf, in all processes.
        """
        task, match = distiller.task, distiller.logits_match
        student, teacher = distiller.student_signals(outputs, batch), distiller.teacher_signals(batch)
        found = match.per_row(student, teacher, task, batch, progress=1.0)
        ours, theirs = found.choices()
        examples = batch_size(batch)
        rows_an_example = max(1, task.rows(batch) // examples)
        kept = found.kept
        if kept is None:
            kept = torch.arange(found.values.shape[0], device=found.values.device)
        right = _right(distiller, found, teacher, batch, kept)
        is_wrong = is_nan_or_inf(found.teacher.float().sum(-1))
        figures = [found.values, ours == theirs, torch.ones_like(ours), *right, is_wrong]
        each = torch.stack([figure.float() for figure in figures], 1)
        sums = torch.zeros(examples, each.shape[1], device=each.device)
        sums.index_add_(0, kept // rows_an_example, each)
        gathered = self._gather(sums).cpu().double()  # on the CPU: not every device has fp64
        wrong = gathered[:, -1].nonzero().flatten().tolist()
        if wrong:
            raise TeacherError(
                f"the teacher's predictions hold NaN or inf for example {self._examples + wrong[0]} of the evaluation "
                f"({len(wrong)} such examples in its batch of {len(gathered)}), so student and teacher cannot be "
                f"compared. {ADVICE}"
            )
        self._examples += len(gathered)
        self._sums += gathered[:, :-1].sum(0)
        return teacher

    def read(self, *, on_values: bool) -> dict[str, float]:
        """Return the metrics; empty if there was no valid row."""
        divergence, agreeing, rows = self._sums[:3].tolist()
        if rows == 0:
            return {}
        metrics = {"divergence": divergence / rows}
        if not on_values:
            metrics["teacher_agreement"] = agreeing / rows
        return metrics

    def passed(self) -> str | None:
        """Return a sentence if the student is right more often than its teacher, by more than chance; else None."""
        labelled, teachers, by_student, by_teacher = self._sums[3:].tolist()
        if by_student - by_teacher <= SURE * math.sqrt(by_student + by_teacher):
            return None
        students = teachers + by_student - by_teacher
        return (
            f"The student has passed its teacher on these labels: it names {students / labelled:.1%} of "
            f"{labelled:,.0f}, the teacher {teachers / labelled:.1%}. From here on the teacher holds it back: lower "
            "alpha, or train the teacher longer."
        )


def _right(distiller: Distiller, found: RowValues, teacher: Signals, batch: Batch, kept: Tensor) -> list[Tensor]:
    """Return four masks `[m]`: has a label; teacher right; only the student right; only the teacher right."""
    targets = None if distiller.task.on_values else distiller.task.targets(batch)
    ours, theirs = found.choices()
    if targets is None or (teacher.sparse is not None and teacher.sparse.weights is not None):
        return [torch.zeros_like(ours)] * 4
    targets = teacher.alignment.of_labels(targets[kept])
    labelled, by_student, by_teacher = targets >= 0, ours == targets, theirs == targets
    return [labelled, labelled & by_teacher, labelled & by_student & ~by_teacher, labelled & by_teacher & ~by_student]


class TeacherPredictions:
    """Collects the teacher's predictions as `Trainer` collects the student's, for the user's `compute_metrics`.

    It replaces `compute_metrics` during an evaluation, and adds `teacher_<metric>` beside each metric.

    Args:
        gather: gathers values of examples over the processes.
    """

    def __init__(self, trainer: DistillationMixin, gather: Gather, prefix: str) -> None:
        self._compute_metrics: Any = trainer.compute_metrics
        self._preprocess = trainer.preprocess_logits_for_metrics
        self._accelerator, self._args = trainer.accelerator, trainer.args
        self._gather, self._prefix = gather, prefix
        self._batches = 0
        self._found = EvalLoopContainer(self._args.eval_do_concat_batches, padding_index=-100)
        self.why_none: str | None = None

    def add(self, distiller: Distiller, teacher: Signals, outputs: Outputs, found: Prediction) -> None:
        """Collect a batch.

        Args:
            teacher: the teacher's predictions.
            outputs: the student's outputs.
            found: the student's loss, predictions and labels, from `prediction_step`.
        """
        if self.why_none is not None:
            return
        logits, own = teacher.logits, outputs.get("logits")
        if logits is None:
            self.why_none = "this teacher lists only the likeliest columns of each row, and a metric may look at all"
            return
        parts = distiller.task.as_outputs(logits, teacher.alignment, logits.shape[-1] if own is None else own.shape[-1])
        if parts is None:
            self.why_none = f"the outputs of a head for {distiller.task} do not follow from what is compared"
            return
        if own is not None and own.numel() == parts[0].numel():
            parts = (parts[0].reshape(own.shape),)  # a single value without an axis
        made: Any = parts if isinstance(found[1], tuple) else parts[0]
        made = self._accelerator.pad_across_processes(made, dim=1, pad_index=-100)
        if self._preprocess is not None:
            labels = self._accelerator.pad_across_processes(found[2], dim=1, pad_index=-100)
            try:
                made = self._preprocess(made, labels)
            except _METRIC_ERRORS as error:
                self.why_none = f"preprocess_logits_for_metrics failed on the teacher's predictions: {error!r}"
                return
        self._found.add(self._gather(made))
        self._batches += 1
        steps = self._args.eval_accumulation_steps
        if steps is not None and self._batches % steps == 0:
            self._found.to_cpu_and_numpy()

    def __call__(self, evaluated: EvalPrediction) -> dict[str, float]:
        """Return the student's metrics and the teacher's."""
        labels = _copied(evaluated.label_ids)  # some metric functions write into them
        metrics = self._compute_metrics(evaluated)
        predictions = self._found.get_arrays()
        if self.why_none is not None or predictions is None:
            return metrics
        try:
            theirs = self._compute_metrics(
                EvalPrediction(predictions=predictions, label_ids=labels, inputs=evaluated.inputs)
            )
        except _METRIC_ERRORS as error:
            self.why_none = f"compute_metrics failed on the teacher's predictions: {error!r}"
            return metrics
        named = {f"teacher_{name.removeprefix(f'{self._prefix}_')}": value for name, value in theirs.items()}
        return {**metrics, **named}


def _copied(arrays: Any) -> Any:
    if isinstance(arrays, (list, tuple)):
        return type(arrays)(_copied(x) for x in arrays)
    return np.array(arrays)


@contextlib.contextmanager
def each_example_once(trainer: DistillationMixin, dataloader: DataLoader) -> Iterator[None]:
    """Inside this context, gather without the copies that fill up the last batches of several processes."""
    accelerator = trainer.accelerator
    gathers = getattr(trainer.gather_function, "func", trainer.gather_function)  # Trainer binds a setting to it
    keeps_all = gathers == accelerator.gather  # Seq2SeqTrainer's choice
    is_trainers = keeps_all or gathers == accelerator.gather_for_metrics
    alone = accelerator.num_processes == 1 or trainer.get_tp_size() > 1
    if alone or not is_trainers or trainer.args.eval_use_gather_object:
        yield
        return
    with examples_counted(dataloader) as counted:
        # As in one process, where nothing is removed from a dataset without a length either.
        whole_batches = keeps_all or (counted is not None and not has_length(counted))
        trainer.gather_function = EachOnce(accelerator, counted, whole_batches=whole_batches)
        try:
            yield
        finally:
            trainer.gather_function = accelerator.gather_for_metrics


@contextlib.contextmanager
def teacher_evaluated(trainer: DistillationMixin, prefix: str, loss_only: bool) -> Iterator[TeacherMetrics]:
    """Inside this context, run the teacher on each batch too, and compute the user's metrics of its predictions."""
    gather = trainer.gather_function
    trainer._teacher_metrics = TeacherMetrics(
        gather if isinstance(gather, EachOnce) else trainer.accelerator.gather_for_metrics
    )
    compute_metrics, why_none = trainer.compute_metrics, None
    generates = isinstance(trainer, Seq2SeqTrainer) and trainer.args.predict_with_generate
    if compute_metrics is not None and not loss_only:
        if generates:
            why_none = "predict_with_generate=True: the metrics are of texts that only the student generates"
        elif trainer.args.batch_eval_metrics:
            why_none = "batch_eval_metrics=True: compute_metrics keeps sums of the student's batches"
        else:
            trainer._teacher_predictions = TeacherPredictions(trainer, gather, prefix)
            trainer.compute_metrics = trainer._teacher_predictions
    try:
        yield trainer._teacher_metrics
    finally:
        if trainer._teacher_predictions is not None:
            why_none = trainer._teacher_predictions.why_none
        trainer._teacher_metrics = trainer._teacher_predictions = None
        trainer.compute_metrics = compute_metrics
    if why_none is not None:
        trainer._warn_once(f"There is no {prefix}_teacher_<metric>: {why_none}.")


def check_evaluated(trainer: DistillationMixin, inputs: Batch, *, compares: bool) -> None:
    """Check packed and padded texts of an evaluation, as a training step does."""
    student = unwrapped(trainer.model)
    if trainer._packing_check is None or trainer._packing_check.student is not student:
        trainer._packing_check = PackingCheck(student)
    trainer._packing_check([inputs], trainer.distiller.task, trainer.distiller.teacher, Needs(logits=compares))
    if compares:
        trainer.distiller.check_padding([inputs], trainer.distiller.teacher, trainer.accelerator)


def warn_of_infinite_loss(trainer: DistillationMixin, inputs: Batch) -> None:
    """Warn once, in any process, if the labels of a batch make its loss infinite."""
    batch = trainer.distiller.with_task_labels(inputs)
    fault = trainer.distiller.task.label_fault(batch) if trainer.distiller.finds_labels(batch) else None
    if fault is not None and "infinite loss" not in trainer._warnings_given:
        trainer._warnings_given |= {"infinite loss"}
        logger.warning(
            f"In a batch of the evaluation {fault}. Until then, Trainer leaves the batches of such examples out of "
            "eval_loss (logging_nan_inf_filter), or reports an infinite one."
        )


@torch.no_grad()
def compare_with_teacher(trainer: DistillationMixin, model: nn.Module, inputs: Keywords, found: Prediction) -> None:
    assert trainer._teacher_metrics is not None
    batch = trainer.distiller.prepare(trainer.distiller.with_task_labels(trainer._prepare_inputs(inputs)))
    outputs = trainer._evaluated_outputs
    if outputs is None:  # no labels, or generation: the forward that is compared has not been made
        outputs = model(**trainer.distiller.student_inputs(batch, labels=False))
    teacher = trainer._teacher_metrics.add(trainer.distiller, outputs, batch)
    if trainer._teacher_predictions is not None and found[2] is not None:
        trainer._teacher_predictions.add(trainer.distiller, teacher, outputs, found)
