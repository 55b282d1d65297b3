"""Trainings whose loss or gradient is not finite, for tests and a child process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, gather_object

from hf_distill import Distiller, HfDistillError
from tests.heads import HEADS, Head
from tests.trainer.tiny import make, weights

# The fault of one example of process 1: the kind of training, and the fault.
FAULTS = [
    ("trainer", "labels"),
    ("trainer", "input"),
    ("trainer", "teacher"),
    ("trainer", "gradient"),
    ("trainer", "unclipped"),
    ("loop", "labels"),
    ("loop", "teacher"),
]


def sounds(head: Head, count: int, *, wrong: int | None, fault: str) -> list[dict[str, Any]]:
    """Return examples of a CTC head, one of which has the fault."""
    examples = head.examples(count)
    if wrong is None:
        return examples
    if fault == "labels":
        examples[wrong]["labels"] = [4] * 30  # needs 59 frames; the longest recording gives 24
    elif fault == "input":
        examples[wrong]["input_values"][7] = float("nan")
    elif fault == "teacher":
        examples[wrong]["input_values"][7] = MARK
    return examples


MARK = 1234.5  # a sample for which the teacher of `deaf` returns NaN


def deaf(model: Any) -> Any:
    """Return the model, with NaN logits for examples that contain `MARK`."""
    seen: dict[str, Any] = {}

    def look(_: Any, __: Any, given: dict[str, Any]) -> None:
        seen["marked"] = (given["input_values"] == MARK).any(-1)

    def answer(_: Any, __: Any, logits: Any) -> Any:
        return torch.where(seen["marked"][:, None, None], torch.nan, logits)

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.lm_head.register_forward_hook(answer)
    return model


def what_each_process_raises(folder: Path | str, fault: tuple[str, str]) -> dict[str, Any]:
    """Return each process's error, and whether its student is unchanged; example 1 of process 1's batch 2 is faulty.

    The first step of a process is two micro-batches of two examples.
    """
    how, what = fault
    head, rank = HEADS["wav2vec2_ctc_mean"], PartialState().process_index
    student, teacher = head.make(seed=0), deaf(head.make(seed=1))
    examples = sounds(head, 8, wrong=7, fault=what)  # process 1 has examples 2 3 and 6 7
    message = None
    try:
        if how == "loop":
            loop(head, student, teacher, examples[4 * rank : 4 * rank + 4])
        else:
            trained(folder, head, student, teacher, examples, what, rank)
    except HfDistillError as error:
        message = f"{type(error).__name__}: {error}"
    start = weights(head.make(seed=0))
    unchanged = all(torch.equal(value, start[name]) for name, value in weights(student).items())
    return dict(enumerate(gather_object([(message, unchanged)])))


def trained(folder: Any, head: Head, student: Any, teacher: Any, examples: list[Any], what: str, rank: int) -> None:
    trainer = make(
        folder,
        student,
        teacher,
        train_dataset=examples,
        data_collator=head.collate,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        max_steps=1,
        max_grad_norm=0.0 if what == "unclipped" else 1.0,
    )
    if what in ("gradient", "unclipped") and rank == 1:
        student.lm_head.bias.register_hook(lambda gradient: gradient * torch.nan)
    trainer.train()


def loop(head: Head, student: Any, teacher: Any, examples: list[Any]) -> None:
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # SpecAugment's parameters, as it is off
    accelerator = Accelerator(cpu=True, kwargs_handlers=[unused])
    distiller = Distiller(student, teacher)
    model = accelerator.prepare(student.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    distiller.to(accelerator)
    batches = [head.collate(examples[:2]), head.collate(examples[2:])]
    counts = distiller.begin_step(batches, accelerator)
    for batch in batches:
        accelerator.backward(distiller(model, batch, counts).loss)
    optimizer.step()
