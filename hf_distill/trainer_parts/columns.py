"""Which columns of the datasets reach the models: the student's, as in `Trainer`, and the teacher's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.trainer_parts.collation import RAW

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class ColumnsMixin(_Trainer):
    """Keeps what the teacher reads."""

    distiller: Any
    _signature_columns: Any

    def _has_teacher_columns(self) -> bool:
        evaluated: Any = self.eval_dataset
        datasets = [self.train_dataset, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])]
        return any(name.startswith(TEACHER_PREFIX) for data in datasets for name in _columns_of(data))

    def _set_signature_columns_if_needed(self) -> None:
        is_first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        teacher = self.distiller.teacher
        if is_first and teacher is not None:
            known = self._signature_columns
            own = [f"{TEACHER_PREFIX}{name}" for name in (*teacher.inputs, "labels")]
            self._signature_columns = known + [n for n in (*teacher.inputs, *own, *RAW) if n not in known]


def _columns_of(data: Any) -> Iterable[str]:
    """Of a list the first example's: it is not drawn by being looked at."""
    if isinstance(data, (list, tuple)) and data and isinstance(data[0], Mapping):
        return data[0]
    return getattr(data, "column_names", None) or ()
