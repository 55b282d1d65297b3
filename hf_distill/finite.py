"""No optimizer step is made on a loss or a gradient that is not finite: the check, and the search for the cause."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_distill.errors import DataError, HfDistillError, TeacherError, TrainingError
from hf_distill.models.capture import AttentionRecord
from hf_distill.signals import Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import MAIN_INPUTS, batch_size, first_tensor

ADVICE = "Look at that input; a half-precision teacher may overflow: try teacher_dtype='float32' or 'bfloat16'."
CheckAt = Literal["loss", "gradient", "off"]
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
# Errors of a forward that does not support a single example; the search then skips this part.
_FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)


@dataclass(frozen=True)
class MicroBatch:
    """The facts of a micro-batch that are needed to find the cause of a loss that is not finite.

    Attributes:
        batch: the batch that the models got.
        loss: scalar, detached.
        terms: each term before its weight, detached.
        student: the student without wrappers.
        inputs: returns the student's inputs.
        teacher: runs the teacher on a batch once more; None if the loss does not need it.
    """

    task: Task
    batch: Batch
    loss: Tensor
    terms: Mapping[str, Tensor]
    student: nn.Module
    inputs: Callable[[], Mapping[str, Any]]
    teacher: Callable[[Batch], Signals] | None


class FiniteCheck:
    """Checks the losses of one optimizer step, and raises before the step if one is not finite.

    In one process on a CPU it checks each loss when it is computed. Elsewhere it checks once a step, at the last
    micro-batch: one synchronisation, and over several processes one small reduction, so that all of them raise.

    Under mixed precision with fp16 the gradient scaler skips steps that overflow, so only a fault of the teacher, of an
    input or of a label is raised there.

    Args:
        micro_batches: the number of micro-batches of the step in this process.
        accelerator: None means one process.
        at: "loss"; "gradient" if the caller will call `look_at_gradient` with the norm of the step's gradient; "off" to
            check nothing.
    """

    def __init__(self, micro_batches: int = 1, accelerator: Accelerator | None = None, *, at: CheckAt = "loss") -> None:
        self._micro_batches, self._accelerator, self._at = micro_batches, accelerator, at
        self._several = accelerator is not None and accelerator.num_processes > 1
        self._seen: list[MicroBatch] = []

    def add(self, loss: Tensor, seen: MicroBatch) -> Tensor:
        """Check the loss of a micro-batch, and return the loss to differentiate.

        Raises:
            HfDistillError: if the loss is not finite; the message names term, micro-batch, example and cause.
        """
        if self._at == "off":
            return loss
        self._seen.append(seen)
        if self._at == "gradient":
            # Multiplied by 1 if the loss is finite, else by NaN: then the reduced gradient is NaN in every process.
            return loss * (seen.loss * 0 + 1) if self._several else loss
        last = len(self._seen) >= self._micro_batches
        if last or (seen.loss.device.type == "cpu" and not self._several):
            self._look_at_losses(has_gradient=loss.requires_grad)
        if last:
            self._seen = []
        return loss

    def look_at_gradient(self, norm: Tensor | float | None) -> None:
        """Check the norm of the step's gradient, which is the same in all processes, and with it the losses.

        Raises:
            HfDistillError: as for `add`.
        """
        seen, self._seen = self._seen, []
        if self._at != "gradient" or norm is None:
            return
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # for sharded gradients (FSDP2)
        if isinstance(norm, Tensor) and not self._several:
            losses = [one.loss.to(norm.device, torch.float32) for one in seen]
            finite = bool(torch.stack([norm.detach().float(), *losses]).isfinite().all())
        else:
            finite = math.isfinite(norm)
        if not finite:
            self._raise(seen, norm=float(norm), refuses_students=True)

    def _look_at_losses(self, *, has_gradient: bool) -> None:
        finite = torch.stack([one.loss.float() for one in self._seen]).isfinite().all()
        if self._accelerator is not None and self._several:
            finite = self._accelerator.reduce(finite.float(), reduction="sum") >= self._accelerator.num_processes
        if not bool(finite):
            self._raise(self._seen, norm=None, refuses_students=has_gradient)

    def _raise(self, seen: list[MicroBatch], *, norm: float | None, refuses_students: bool) -> None:
        """Raise the error of the first process that found a cause; all processes call this."""
        scaled = self._accelerator is not None and (
            self._accelerator.scaler is not None or self._accelerator.mixed_precision == "fp16"
        )
        refuses_students = refuses_students and not scaled
        found: list[HfDistillError | None] = [self._cause(seen, refuses_students=refuses_students)]
        if self._several:
            found = gather_object(found)
        for process, error in enumerate(found):
            if error is not None:
                raise type(error)(f"process {process}: {error}") if self._several else error
        if norm is not None and refuses_students:
            raise _gradient_error(norm)

    def _cause(self, seen: list[MicroBatch], *, refuses_students: bool) -> HfDistillError | None:
        """Return the cause in the first micro-batch of this process whose loss is not finite, or None."""
        accelerator, found = self._accelerator, None
        sharded = accelerator is not None and accelerator.distributed_type in _SHARDED
        for position, one in enumerate(seen):
            # All processes must run the forward of a sharded teacher together, whichever of them has the fault.
            signals = one.teacher(one.batch) if sharded and one.teacher is not None else None
            if found is not None or bool(one.loss.isfinite()):
                continue
            place = f"micro-batch {position} of {self._micro_batches}"
            found = _fault_of_data(one, place) or _fault_of_teacher(one, signals, place)
            if found is None and refuses_students:
                with contextlib.nullcontext() if accelerator is None else accelerator.autocast():
                    found = _fault_of_student(one, place, can_run=not sharded)
        return found


def _what(one: MicroBatch, place: str) -> str:
    terms = [f"the term {name} is {value.item()}" for name, value in one.terms.items() if not bool(value.isfinite())]
    return f"the loss is {one.loss.item()} in {place}" + (f" ({', '.join(terms)})" if terms else "")


def _fault_of_data(one: MicroBatch, place: str) -> HfDistillError | None:
    """Return the error if an input or a label is not finite, or the head's loss cannot take the labels."""
    examples = batch_size(one.batch)
    for name in (*MAIN_INPUTS, *one.task.label_names):
        value = one.batch.get(name)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape[:1] != (examples,):
            continue
        wrong = ~value.isfinite().reshape(examples, -1)
        if bool(wrong.any()):
            example = int(wrong.any(-1).nonzero()[0])
            cell = value.reshape(examples, -1)[example][wrong[example]][0].item()
            return DataError(
                f"{_what(one, place)}: {name} of example {example} holds {cell} (such values are in "
                f"{int(wrong.any(-1).sum())} of the {examples} examples). No step was made. Repair these examples, or "
                "leave them out."
            )
    labels_term = one.terms.get("labels")
    if labels_term is not None and not bool(labels_term.isfinite()):
        fault = one.task.label_fault(one.batch)
        if fault is not None:
            return DataError(f"{_what(one, place)}: {fault}. No step was made.")
    return None


def _fault_of_teacher(one: MicroBatch, signals: Signals | None, place: str) -> HfDistillError | None:
    """Args: signals: what the teacher gives for this batch, if it has been asked again."""
    if one.teacher is None:
        return None
    signals = one.teacher(one.batch) if signals is None else signals
    if signals.logits is not None or signals.sparse is not None:
        error = _fault_of_rows(one.task, one.batch, signals.values_to_check(), place)
        if error is not None:
            return error
    for read, value in sorted(signals.activations.items(), key=lambda item: item[0].layer):
        x = value.queries.transpose(1, 2).flatten(2) if isinstance(value, AttentionRecord) else value  # [b t d]
        mask = one.batch.get("attention_mask")
        shown = x[mask.bool()] if mask is not None and mask.shape == x.shape[:2] else x
        wrong = shown[~torch.isfinite(shown)]
        if wrong.numel():
            return TeacherError(
                f"the teacher's {read.what} of block {read.layer} hold {wrong[0].item()} ({place}). No step was "
                f"made. {ADVICE}"
            )
    return None


def _fault_of_rows(task: Task, batch: Batch, predictions: Tensor, place: str) -> HfDistillError | None:
    rows, kept = task.select(predictions, batch), task.kept_rows(batch)
    looked_at = rows if kept is None else rows[kept]
    wrong = is_nan_or_inf(looked_at).any(-1)
    if not bool(wrong.any()):
        return None
    first = int(wrong.nonzero()[0])
    row = first if kept is None else int(kept[first])
    rows_an_example = max(1, rows.shape[0] // first_tensor(batch).shape[0])
    value = looked_at[first][~torch.isfinite(looked_at[first])][0].item()
    return TeacherError(
        f"the teacher's logits hold {value} in example {row // rows_an_example}, row {row % rows_an_example} of "
        f"it ({place}; {int(wrong.sum())} such rows in it). No step was made. {ADVICE}"
    )


def is_nan_or_inf(x: Tensor) -> Tensor:
    """Return whether values are NaN or +inf; -inf marks a blocked column."""
    return torch.isnan(x) | (x == torch.inf)


def _fault_of_student(one: MicroBatch, place: str, *, can_run: bool) -> HfDistillError:
    """Return the error if the student's weights are not finite, or its outputs or loss on some example."""
    named = list(one.student.named_parameters())
    broken = [name for name, value in named if not bool(_local(value).isfinite().all())]
    if broken:
        return TrainingError(
            f"{_what(one, place)}: {len(broken)} of the student's {len(named)} weights hold NaN or inf, the first is "
            f"{broken[0]}. They did before this step, which was not made. Start from other weights."
        )
    found = _example_alone(one) if can_run else None
    return TrainingError(
        f"{_what(one, place)}{'' if found is None else f': {found}'}. No step was made. The teacher's values and the "
        "inputs are finite. Causes: overflow in half precision (train with bf16=True rather than in float16, or in "
        "float32), weights that have grown too far (a smaller learning_rate, warmup_steps), or a loss or an "
        "objective of your own that divides by 0 or takes the logarithm of 0."
    )


@torch.no_grad()
def _example_alone(one: MicroBatch) -> str | None:
    """Run the examples one by one, and say on which the student's outputs or its own loss are not finite."""
    examples = batch_size(one.batch)
    inputs = one.inputs()
    cut = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() > 0}
    if any(value.shape[0] != examples for value in cut.values()):
        return None
    with _evaluating(one.student):
        for example in range(examples):
            alone = {**inputs, **{name: value[example : example + 1] for name, value in cut.items()}}
            try:
                outputs = one.student(**alone)
            except _FORWARD_ERRORS:
                return None
            for name, value in outputs.items() if isinstance(outputs, Mapping) else ():
                if isinstance(value, Tensor) and value.is_floating_point() and bool(is_nan_or_inf(value).any()):
                    wrong = value[is_nan_or_inf(value)].flatten()[0].item()
                    return f"for example {example} alone, the student's {name} holds {wrong}"
    return None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside this context, run without dropout, and without batch norm statistics of a single example."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _gradient_error(norm: float) -> HfDistillError:
    return TrainingError(  # the weight is unknown: clipping by such a norm has made all gradients NaN
        f"the norm of the gradient is {norm}, and every term of the loss is finite. No step was made. Causes: overflow "
        "in half precision (train with bf16=True rather than in float16, or in float32), or a square root, a division "
        "or a norm at 0 in a loss or an objective of your own; torch.autograd.set_detect_anomaly(True) names the "
        "operation."
    )


def _local(value: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor."""
    return value.to_local() if isinstance(value, DTensor) else value
