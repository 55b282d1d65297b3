"""A collator that makes the inputs of each of several teachers, `teacher_0_*` and so on, by processors of their own."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.trainer_parts.collation import TeacherInputsCollator

_NUMBERED = re.compile(rf"{TEACHER_PREFIX}(\d+)_(.+)")


def teacher_inputs_collator(collator: Callable[..., Any], processor: Any) -> Any:
    """For one processor of all teachers, or for a list with one for each."""
    if isinstance(processor, (list, tuple)):
        return SeveralInputsCollator(collator, processor)
    return TeacherInputsCollator(collator, processor)


class SeveralInputsCollator:
    """The user's collator for the student's columns; those of each teacher are made beside it.

    `teacher_text` (audio, image) is read by every processor; `teacher_0_text` by the first alone, in its place. Where
    the list has None, that teacher reads what the student reads, unless it has numbered columns, ready to be stacked.

    Args:
        collator: for everything else. processors: of each teacher, in the order of the ensemble.
    """

    def __init__(self, collator: Callable[..., Any], processors: Sequence[Any]) -> None:
        self.collator = collator
        self.processors = list(processors)
        self._each = [TeacherInputsCollator(collator, processor) for processor in self.processors]

    def __getattr__(self, name: str) -> Any:
        """Whatever is asked of the user's collator (`tokenizer`, say) is asked of it still."""
        if name in ("collator", "processors"):  # not there yet: being unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def for_evaluation(self) -> SeveralInputsCollator:
        """Around the collator that the user's own names for evaluation, where it augments."""
        clean = getattr(self.collator, "for_evaluation", None)
        if clean is None:
            return self
        other = copy.copy(self)
        other.collator = clean()
        return other

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        batch = self.collator([{k: v for k, v in one.items() if not k.startswith(TEACHER_PREFIX)} for one in features])
        for number, inputs in enumerate(self._each):
            theirs = [_of_teacher(one, number, shares=inputs.processor is not None) for one in features]
            if theirs and theirs[0]:
                made = inputs.teacher_batch(theirs)
                batch.update({f"{TEACHER_PREFIX}{number}_{name}": value for name, value in made.items()})
        return batch


def _of_teacher(feature: Mapping[str, Any], number: int, *, shares: bool) -> dict[str, Any]:
    """The columns of one teacher as if it were the only one."""
    own, shared = {}, {}
    for name, value in feature.items():
        found = _NUMBERED.fullmatch(name)
        if found is not None and int(found[1]) == number:
            own[f"{TEACHER_PREFIX}{found[2]}"] = value
        elif found is None and name.startswith(TEACHER_PREFIX):
            shared[name] = value
    return own or (shared if shares else {})
