"""A model as teacher: frozen, in evaluation mode in every step, never seen by the optimizer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill._compat import prepare_for_evaluation
from hf_distill.errors import DataError, TeacherError
from hf_distill.inside.output_head import OutputHead
from hf_distill.inside.recorder import Inside
from hf_distill.signals import Needs, Signals, Unmade
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.tasks.infer import forward_names, unwrapped
from hf_distill.teachers import fitting
from hf_distill.vocabulary import Columns

logger = logging.getLogger(__name__)
_NEVER_GIVEN = ("labels", "start_positions", "end_positions")


class ModelTeacher:
    """A transformers model, or anything that is called with keywords and returns an output with logits.

    The model is frozen in place (`requires_grad_(False)`, `eval()`) once it is put to use. It reads its own inputs,
    `teacher_*` columns with the prefix taken off, where the batch has them, and else the student's.

    Args:
        model: the model. processor: its tokenizer or feature extractor, where it is not the student's.
        label_matching: "by_name" or "by_index".
        dtype: cast it to this, or keep its own ("auto"); then it does not run under the student's mixed precision.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        processor: Any = None,
        label_matching: str = "by_name",
        dtype: Any = None,
    ) -> None:
        self.model: Any = model
        self.columns = Columns()
        self._processor = processor
        self._label_matching = label_matching
        self._dtype = dtype
        self._in_use = False
        self._accelerator: Any = None
        self._cannot_read_students: str | None = None
        self.inside = Inside(model, "teacher")
        self._head: OutputHead | None = None
        self.inputs = tuple(name for name in forward_names(model) if name not in _NEVER_GIVEN)

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        self._put_to_use()
        self._set_mode()
        inputs = self._in_own_dtype(self._inputs(batch))
        try:
            with torch.no_grad(), self._precision():
                head = self._head_for(needs, inputs)
                heard: list[Unmade] = []
                listening = contextlib.nullcontext() if head is None else head.listened(heard)
                with self.inside.reading(needs.reads) as inside, listening:
                    outputs = self.model(**inputs)
        except (RuntimeError, IndexError) as error:
            self._explain(error, inputs)
            raise
        if head is not None:
            return Signals(None, columns=self.columns, inside=inside, unmade=heard[0])
        logits = task.read(outputs, batch, self.columns, teacher=True) if needs.logits else None
        return Signals(logits=logits, columns=self.columns, inside=inside)

    def fit(
        self,
        student: nn.Module,
        task: Task,
        *,
        student_processor: Any = None,
        compares_predictions: bool = True,
        same_inputs: bool = False,
    ) -> None:
        """Check that this model can teach that one, and pair the columns of their heads. See `Teacher.fit`.

        Raises:
            TeacherError: the same object, shared weights, another kind of head, labels or vocabulary that do not match.
        """
        student, teacher = unwrapped(student), unwrapped(self.model)
        fitting.refuse_shared_weights(student, teacher)
        if compares_predictions:
            fitting.refuse_other_head(teacher, task)
        ours, theirs = fitting.tokenizer_in(student_processor), fitting.tokenizer_in(self._processor)
        theirs = theirs or fitting.tokenizer_of(teacher)
        if compares_predictions:
            self.columns = fitting.matched_columns(
                student, teacher, task, tokenizers=(ours, theirs), label_matching=self._label_matching
            )
        else:
            self.columns = fitting.known_columns(task, (ours, theirs))
        needs_same_inputs = task.needs_same_inputs and compares_predictions
        difference = fitting.input_difference(student, teacher, task, tokenizers=(ours, theirs))
        if difference is not None and (needs_same_inputs or same_inputs):
            what = f"A {task.kind} head predicts" if needs_same_inputs else "An objective compares"
            raise TeacherError(
                f"student and teacher have different tokenizers: {difference}. {what} positions "
                "of the input, so both must read the same one. Use a teacher with the student's tokenizer, or build "
                "the student from the teacher. (If only padded rows of the embeddings differ, pass processing_class= "
                "and teacher_processing_class=.)"
            )
        self._cannot_read_students = difference
        task.learn_from(getattr(teacher, "config", None))

    def place(self, accelerator: Any) -> None:
        self._put_to_use()
        self._accelerator = accelerator
        self.model = prepare_for_evaluation(self.model, accelerator)

    def after_step(self, student: nn.Module) -> None:
        """Nothing: it is frozen."""

    def _head_for(self, needs: Needs, inputs: dict[str, Any]) -> OutputHead | None:
        """The output head, where what it is given will do in place of the logits, and can be had."""
        if not (needs.logits and needs.unmade):
            return None
        if self._head is None:
            head = OutputHead(self.model)
            if head.refusal is None and head.is_sharded():
                head.refusal = "its head is sharded, and would be in pieces again where it is needed"
            elif head.refusal is None:
                found = head.trial(inputs, {})
                head.refusal = found if isinstance(found, str) else None
            if head.refusal is not None:
                logger.info(f"The teacher's logits are made whole: {head.refusal}.")
            self._head = head
        return None if self._head.refusal is not None else self._head

    def _put_to_use(self) -> None:
        """Freeze and cast: only now, so that a run that is refused leaves the user's model as it was."""
        if self._in_use:
            return
        self.model.requires_grad_(False)
        self.model.eval()
        if isinstance(self._dtype, torch.dtype):
            self.model.to(self._dtype)
        self._in_use = True

    def _set_mode(self) -> None:
        if any(module.training for module in self.model.modules()):
            self.model.eval()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """The student's mixed precision, for a teacher held in full precision."""
        if self._accelerator is None or self._dtype is not None or self._parameter_dtype() != torch.float32:
            return contextlib.nullcontext()
        return self._accelerator.autocast()

    def _parameter_dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)

    def _in_own_dtype(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Speech and image features in the dtype of a half-precision teacher."""
        dtype = self._parameter_dtype()
        return {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        own = {
            name.removeprefix(TEACHER_PREFIX): value for name, value in batch.items() if name.startswith(TEACHER_PREFIX)
        }
        if "decoder_input_ids" in batch:
            own.setdefault("decoder_input_ids", batch["decoder_input_ids"])
        main = self._main_input()
        source: Mapping[str, Any] = own if main in own else batch
        # A forward that names nothing is given whatever the student is given.
        known = self.inputs or tuple(n for n in source if n not in _NEVER_GIVEN and not n.startswith(TEACHER_PREFIX))
        inputs = {name: source[name] for name in known if source.get(name) is not None}
        if main not in inputs and "inputs_embeds" not in inputs:
            raise DataError(
                f"the teacher ({type(unwrapped(self.model)).__name__}) needs {main}, the batch has {sorted(batch)}. "
                f"Give the dataset a column {TEACHER_PREFIX}{main}, or {TEACHER_PREFIX}text, {TEACHER_PREFIX}audio or "
                f"{TEACHER_PREFIX}image with teacher_processing_class=; such columns survive remove_unused_columns. "
                "If a map() or a collator of yours dropped it, keep it there."
            )
        if self._cannot_read_students is not None and source is batch:
            raise DataError(
                f"the teacher has another tokenizer and cannot read the student's {main}: "
                f"{self._cannot_read_students}. Give the dataset a column {TEACHER_PREFIX}text (or "
                f"{TEACHER_PREFIX}{main}); the collator turns it into the teacher's inputs with "
                "teacher_processing_class."
            )
        if "use_cache" in self.inputs:  # it would cost memory, and hide from transformers where packed sequences end
            inputs["use_cache"] = False
        return inputs

    def _main_input(self) -> str:
        """What the class calls its main input, or the first argument of a forward that does not know that name."""
        named = str(getattr(unwrapped(self.model), "main_input_name", "input_ids"))
        return named if not self.inputs or named in self.inputs else self.inputs[0]

    def _explain(self, error: Exception, inputs: dict[str, Any]) -> None:
        """Say whose forward failed, where that follows from the length of the input."""
        config = getattr(unwrapped(self.model), "config", None)
        longest, ids = getattr(config, "max_position_embeddings", None), inputs.get("input_ids")
        if longest is not None and ids is not None and ids.shape[-1] > longest:
            raise TeacherError(
                f"the teacher's forward failed on an input of {ids.shape[-1]} positions; it knows {longest}. Truncate "
                f"(max_length={longest}), or give it {TEACHER_PREFIX} columns of its own. It said: {error}"
            ) from error
