"""Which columns of the datasets reach the models: the student's, as in `Trainer`, and the teacher's own.

Columns of other tools that would change the loss, and that nothing reads, are named in a warning.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.tasks.infer import forward_names
from hf_distill.trainer_parts.answer_masks import ANSWER_MASKS, AnswerMaskCollator
from hf_distill.trainer_parts.collation import RAW

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object
logger = logging.getLogger(__name__)
_OF_ONE_TEACHER = re.compile(rf"{TEACHER_PREFIX}\d+_.+")
# What other tools call a teacher's predictions, beside all that begins with teacher_.
_VALUES = re.compile(r"(top_?k?_)?(logits|log_?probs|log_?probabilities|probs)|soft_(labels|targets)|prompt_logprobs")


class ColumnsMixin(_Trainer):
    """Keeps the columns that the teacher reads, and the masks of answers."""

    distiller: Any
    _signature_columns: Any
    _reads_answer_masks = False

    def _has_teacher_columns(self) -> bool:
        own = forward_names(self.model)
        return any(name.startswith(TEACHER_PREFIX) and name not in own for name in self._columns())

    def _columns(self) -> set[str]:
        """The columns of all datasets, as far as they are known."""
        return {name for data in self._datasets() for name in columns_of(data)}

    def _datasets(self) -> list[Any]:
        evaluated: Any = self.eval_dataset
        return [self.train_dataset, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])]

    @property
    def _base_chooses_columns(self) -> bool:
        """Whether the base trainer chooses its columns itself, as TRL's do: then it reads the masks of answers too."""
        own = getattr(super()._set_signature_columns_if_needed, "__func__", None)
        return own is not Trainer._set_signature_columns_if_needed

    def _set_signature_columns_if_needed(self) -> None:
        is_first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if not is_first:
            return
        teacher = getattr(getattr(self, "distiller", None), "teacher", None)
        added = [] if teacher is None else _read_by(teacher)
        added += ANSWER_MASKS if self._reads_answer_masks else ()
        known = self._signature_columns
        self._signature_columns = known + [name for name in added if name not in known]

    def _collate_answer_masks(self, *datasets: Any) -> None:
        """Let the masks of answers that these datasets may hold become labels."""
        distiller = self.distiller
        if self._reads_answer_masks or self._base_chooses_columns or not any(map(_may_hold_masks, datasets)):
            return
        if distiller.task.kind != "causal_lm" or distiller.compares_nothing():
            return
        of_transformers = getattr(self.data_collator, "__module__", "").startswith("transformers.")
        reads_masks = not (self.args.remove_unused_columns or of_transformers)
        self.data_collator = AnswerMaskCollator(self.data_collator, reads_masks=reads_masks)
        self._reads_answer_masks, self._signature_columns = True, None

    def _warn_of_unread_columns(self) -> None:
        """Name, once, the columns that look as if they were read and are not."""
        columns, teacher = self._columns(), self.distiller.teacher
        masks = sorted(columns & set(ANSWER_MASKS) - set(forward_names(self.model)))
        if masks and not self._reads_answer_masks and not self._base_chooses_columns:
            why = "alpha is 0, which is Trainer, and Trainer does not read it"
            if self.distiller.task.kind != "causal_lm":
                why = "it is read for causal language models alone"
            logger.warning(
                f"The dataset has {' and '.join(masks)}, which is not read: {why}. To train on answers alone, give it "
                "labels that are -100 on all other tokens."
            )
        if teacher is not None and teacher.inputs:  # one that names no inputs is given all that begins with teacher_
            values = sorted(columns_with_values(columns) - {*forward_names(self.model), *_read_by(teacher)})
            if values:
                logger.warning(f"The dataset has {', '.join(values)}, which is not read. {VALUES_AS_TEACHER}")


VALUES_AS_TEACHER = (
    "To learn from predictions that you have, pass a Teacher of your own as teacher_model= that returns them from the "
    "batch (docs/teachers.md, 'Predictions that you have'); to keep those of a model, build a TeacherCache."
)


def columns_with_values(columns: Iterable[str]) -> set[str]:
    """Those that look like a teacher's predictions."""
    return {
        name
        for name in columns
        if (name.startswith(TEACHER_PREFIX) or _VALUES.fullmatch(name)) and not _OF_ONE_TEACHER.fullmatch(name)
    }


def columns_of(data: Any) -> Iterable[str]:
    """The columns of a dataset, of a list those of the first example: it is not drawn by being looked at."""
    if isinstance(data, (list, tuple)) and data and isinstance(data[0], Mapping):
        return data[0]
    return getattr(data, "column_names", None) or ()


def _may_hold_masks(data: Any) -> bool:
    """Whether examples have masks of answers, or their columns are not known."""
    columns = set(columns_of(data))
    return bool(columns & set(ANSWER_MASKS)) if columns else data is not None


def _read_by(teacher: Any) -> list[str]:
    own = (f"{TEACHER_PREFIX}{name}" for name in (*teacher.inputs, "labels"))
    return [*teacher.inputs, *own, *RAW]
