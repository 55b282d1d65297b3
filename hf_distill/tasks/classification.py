"""Rows of class logits: one a sequence, one a token, one a multiple-choice question; text, audio or image."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import DataError, SettingError, TeacherError, did_you_mean
from hf_distill.tasks.base import (
    IGNORED,
    Batch,
    Outputs,
    PositionTask,
    Task,
    attended,
    batch_size,
    labels_of_rows,
    output_named,
    pick,
    require_axes,
)
from hf_distill.vocabulary import HeadAlignment

SEVERAL: Final = "multi_label_classification"
SINGLE: Final = "single_label_classification"
_ADVICE = (
    "Set config.problem_type of both models to that of the labels (transformers takes float labels for several at "
    "once), and use a teacher that was trained for it."
)


class Classification(Task):
    """One row an example, or, with several labels at once, one Bernoulli row (z, 0) a label.

    Every example counts; single-label examples with label -100 are unlabelled and still distilled. As in transformers,
    `config.problem_type` decides between the two, or else the labels' dtype (float: several at once). Rows of floats
    under "single_label_classification" are probabilities: the labels' term is their cross-entropy.
    """

    kind = "classification"
    axis = "example"
    has_classes = has_exits = reads_whole_input = reads_label_column = allows_unlabelled = True
    auto_classes = (
        "AutoModelForSequenceClassification",
        "AutoModelForAudioClassification",
        "AutoModelForImageClassification",
    )
    matched_by = "labels"
    needs_same_inputs = False

    def __init__(self, config: PreTrainedConfig | None) -> None:
        self._config = config
        self._teachers_problem: str | None = None

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Classification:
        return cls(getattr(model, "config", None))

    def learn_from(self, teacher_config: PreTrainedConfig | None) -> None:
        """Store the problem type, which a fresh student's config lacks until a labelled step."""
        super().learn_from(teacher_config)
        self._teachers_problem = getattr(teacher_config, "problem_type", None)
        self.problem  # noqa: B018  # raises if it differs from the student's

    def write_to(self, config: PreTrainedConfig, batch: Batch) -> None:
        """Write label names, and the problem type of several labels: a pipeline then takes a sigmoid, as the loss."""
        super().write_to(config, batch)
        if getattr(config, "problem_type", SINGLE) is None and self.is_multi_label(batch):
            config.problem_type = SEVERAL

    @property
    def problem(self) -> str | None:
        """The student's `problem_type`, or else the teacher's.

        Raises:
            TeacherError: if the two differ.
        """
        ours, theirs = getattr(self._config, "problem_type", None), self._teachers_problem
        if ours is not None and theirs is not None and (ours == SEVERAL) != (theirs == SEVERAL):
            raise TeacherError(
                f"the student's problem_type is {ours!r}, the teacher's {theirs!r}: one predicts one label, the other "
                f"several at once. {_ADVICE}"
            )
        return ours or theirs

    def is_multi_label(self, batch: Batch) -> bool:
        problem, labels = self.problem, batch.get("labels")
        if problem is None:
            return labels is not None and labels.is_floating_point() and labels.dim() == 2
        if problem == SEVERAL and labels is not None and labels.dim() == 1:
            raise TeacherError(
                f"there is one label an example, but problem_type is {problem!r} (the teacher's: "
                f"{self._teachers_problem!r}): several at once. {_ADVICE}"
            )
        return problem == SEVERAL

    def has_probabilities(self, batch: Batch) -> bool:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or not labels.is_floating_point() or labels.dim() != 2:
            return False
        return labels.shape[1] > 1 and self.problem == SINGLE

    def read(self, outputs: Outputs, batch: Batch, columns: HeadAlignment, *, teacher: bool) -> Tensor:
        logits = output_named("logits", outputs)
        if logits.dim() != 2:
            hint = self._class_axis(logits)
            require_axes(logits, ("example", "class"), what="logits", teacher=teacher, hint=hint)
        logits = pick(logits, columns, teacher=teacher)  # [b v]
        if not self.is_multi_label(batch):
            return logits
        return torch.stack((logits, torch.zeros_like(logits)), -1)  # [b v 2]

    def _class_axis(self, logits: Tensor) -> str:
        """Return a sentence about the axis that seems to hold the classes, for the message."""
        classes = getattr(self._config, "num_labels", None)
        found = [axis for axis, length in enumerate(logits.shape) if axis > 0 and length == classes]
        if len(found) != 1:
            return ""
        is_last = found[0] == logits.dim() - 1
        rest = "an example has several rows" if is_last else "the last axis would be taken for the classes"
        return f"Axis {found[0]} is as long as config.num_labels ({classes}): {rest}. "

    def as_outputs(self, x: Tensor, columns: HeadAlignment, width: int) -> tuple[Tensor, ...]:
        return (columns.as_student(x[..., 0] if x.dim() == 3 else x, width),)

    def select(self, x: Tensor, batch: Batch) -> Tensor:
        return x.flatten(0, 1) if self.is_multi_label(batch) else x

    def rows(self, batch: Batch) -> int:
        if not self.is_multi_label(batch):
            return batch_size(batch)
        if batch.get("labels") is not None:
            return batch["labels"].numel()
        assert self._config is not None and self._config.num_labels is not None  # it declares several labels
        return batch_size(batch) * self._config.num_labels

    def rows_are_distributions(self, batch: Batch) -> bool:
        return not self.is_multi_label(batch)

    def label_count(self, batch: Batch) -> Tensor:
        labels = batch["labels"]
        if self.is_multi_label(batch):
            return torch.tensor(labels.shape[0], device=labels.device)
        labels = labels[:, 0] if self.has_probabilities(batch) else labels
        return (labels != IGNORED).sum()

    def targets(self, batch: Batch) -> Tensor | None:
        labels = batch.get("labels")
        if labels is None or self.is_multi_label(batch) or self.has_probabilities(batch):
            return None
        return labels.flatten()

    def check_labels(self, batch: Batch) -> None:
        if self.is_multi_label(batch):
            check_no_ignored(batch["labels"], "several labels at once")
        elif self.has_probabilities(batch):
            self._check_probabilities(batch["labels"])

    def _check_probabilities(self, labels: Tensor) -> None:
        labelled = labels[labels[:, 0] != IGNORED]
        if bool(((labelled.sum(1) - 1).abs() > 1e-3).any()):
            raise TeacherError(
                "the labels have a number for each class and do not add up to 1, so they are several labels at once, "
                f"but problem_type is {SINGLE!r} (the teacher's: {self._teachers_problem!r}). {_ADVICE}"
            )

    def raw_of_predictions(self, predictions: Tensor) -> Tensor:
        # Several labels at once are `[b v 2]` with rows (z, 0).
        return predictions[..., 0] - predictions[..., 1] if predictions.dim() == 3 else predictions


class MultipleChoice(Task):
    """One row a question, over its choices, which both models must read in the same order."""

    kind = "multiple_choice"
    axis = "example"
    has_classes = reads_whole_input = reads_label_column = True
    auto_classes = ("AutoModelForMultipleChoice",)
    matched_by = "positions"

    def targets(self, batch: Batch) -> Tensor | None:
        return batch.get("labels")


class TokenClassification(PositionTask):
    """One row a token.

    Args:
        rows: "labelled" keeps tokens whose label is not -100 (usually first pieces of words); "attended" keeps all that
            the attention mask shows, as is always done without labels.
    """

    kind = "token_classification"
    axis = "input"
    has_classes = has_exits = reads_label_column = True
    auto_classes = ("AutoModelForTokenClassification",)
    padding_collator = "DataCollatorForTokenClassification(tokenizer)"
    matched_by = "labels"

    def __init__(self, rows: str = "labelled") -> None:
        if rows not in ("labelled", "attended"):
            hint = did_you_mean(rows, ("labelled", "attended"), {"labeled": "labelled"})
            raise SettingError(f"rows={rows!r}: allowed are 'labelled' and 'attended'.{hint}")
        self._rows = rows

    def keep(self, batch: Batch) -> Tensor:
        if self._rows == "labelled" and batch.get("labels") is not None:
            return (batch["labels"] != IGNORED).flatten()
        return attended(batch, "attention_mask", ("labels", "input_ids", "inputs_embeds")).flatten()

    def targets(self, batch: Batch) -> Tensor | None:
        return labels_of_rows(batch)


def check_no_ignored(labels: Tensor, head: str) -> None:
    """Raise `DataError` for label -100 in a head whose loss is no cross-entropy, and would learn it as a value."""
    unlabelled = (labels == IGNORED).flatten(1).any(-1) if labels.dim() > 1 else labels == IGNORED
    if bool(unlabelled.any()):
        example = int(unlabelled.nonzero()[0])
        raise DataError(
            f"example {example} of the batch has label -100, which a head for {head} takes for a value. Leave "
            "unlabelled examples out, or train without labels (alpha=1)."
        )
