"""A model as teacher: frozen, in evaluation mode in every step, never seen by the optimizer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill._compat import prepare_for_evaluation
from hf_distill.errors import DataError, SettingError, TeacherError
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.tasks.infer import infer_kind, unwrapped
from hf_distill.vocabulary import (
    Columns,
    match_labels,
    match_vocabularies,
    tokenizer_difference,
)

_NEVER_GIVEN = ("labels", "start_positions", "end_positions", "kwargs", "args")


class ModelTeacher:
    """A transformers model, or anything that is called with keywords and returns an output with logits.

    The model is frozen in place (`requires_grad_(False)`, `eval()`) once it is put to use. It reads its own
    inputs, `teacher_*`
    columns with the prefix taken off, where the batch has them, and else the student's.

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
        self._reads_its_own = False
        forward = inspect.signature(unwrapped(model).forward).parameters
        self.inputs = tuple(name for name in forward if name not in _NEVER_GIVEN)

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        self._put_to_use()
        if any(module.training for module in self.model.modules()):
            self.model.eval()
        inputs = self._in_own_dtype(self._inputs(batch))
        with torch.no_grad(), self._precision():
            outputs = self.model(**inputs)
        return Signals(logits=task.read(outputs, batch, self.columns, teacher=True))

    def fit(self, student: nn.Module, task: Task, *, student_processor: Any = None) -> None:
        """Check that this model can teach that one, and pair the columns of their heads.

        Raises:
            TeacherError: the same object, shared weights, another kind of head, labels or vocabulary that do not match.
        """
        student = unwrapped(student)
        self._refuse_shared_weights(student)
        teacher = unwrapped(self.model)
        self._refuse_other_head(teacher, task)
        if task.matched_by == "labels":
            self.columns = match_labels(student.config, teacher.config, matching=self._label_matching)
        elif task.matched_by == "vocabulary":
            self._match_vocabulary(student, teacher, student_processor)
        elif task.kind == "embedding":
            _refuse_other_width(student.config, teacher.config)
        self._check_inputs(student, teacher, task, student_processor)
        task.learn_from(getattr(teacher, "config", None))

    def place(self, accelerator: Any) -> None:
        self._put_to_use()
        self._accelerator = accelerator
        self.model = prepare_for_evaluation(self.model, accelerator)

    def after_step(self, student: nn.Module) -> None:
        """Nothing: it is frozen."""

    def _put_to_use(self) -> None:
        """Freeze and cast: only now, so that a run that is refused leaves the user's model as it was."""
        if self._in_use:
            return
        self.model.requires_grad_(False)
        self.model.eval()
        if isinstance(self._dtype, torch.dtype):
            self.model.to(self._dtype)
        self._in_use = True

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
        main = getattr(unwrapped(self.model), "main_input_name", "input_ids")
        source: Mapping[str, Any] = own if main in own else batch
        inputs = {name: source[name] for name in self.inputs if source.get(name) is not None}
        if main not in inputs and "inputs_embeds" not in inputs:
            raise DataError(
                f"the teacher ({type(unwrapped(self.model)).__name__}) needs {main}, the batch has {sorted(batch)}. "
                f"Give the dataset a column {TEACHER_PREFIX}{main}, or {TEACHER_PREFIX}text, {TEACHER_PREFIX}audio or "
                f"{TEACHER_PREFIX}image with teacher_processing_class=; such columns survive remove_unused_columns. "
                "If a map() or a collator of yours dropped it, keep it there."
            )
        if self._reads_its_own and source is batch:
            raise DataError(
                f"the teacher has another tokenizer, so it cannot read the student's {main}. Give the dataset a "
                f"column {TEACHER_PREFIX}text (or {TEACHER_PREFIX}{main}); the collator turns it into the teacher's "
                "inputs with teacher_processing_class."
            )
        return inputs

    def _refuse_shared_weights(self, student: nn.Module) -> None:
        if student is unwrapped(self.model):
            raise TeacherError(
                "student and teacher are the same object, so there is nothing to learn and freezing the one freezes "
                "the other. Load the teacher apart, or pass copy.deepcopy(model)."
            )
        theirs = {id(p) for p in self.model.parameters()}
        shared = [name for name, p in student.named_parameters() if id(p) in theirs]
        if shared:
            raise TeacherError(
                f"student and teacher share weights ({shared[0]} and {len(shared) - 1} more): training the one "
                "changes the other. Load the teacher apart."
            )

    def _refuse_other_head(self, teacher: nn.Module, task: Task) -> None:
        try:
            kind = infer_kind(teacher)
        except SettingError:  # not a class of transformers: its outputs will tell
            return
        if kind != task.kind:
            raise TeacherError(
                f"the teacher ({type(teacher).__name__}) has a {kind} head, the student needs a teacher for "
                f"{task.kind}. Fine-tune a teacher with the student's kind of head."
            )

    def _match_vocabulary(self, student: Any, teacher: Any, student_processor: Any) -> None:
        student_blank, teacher_blank = student.config.pad_token_id, teacher.config.pad_token_id
        self.columns = match_vocabularies(
            student_width=_head_width(student),
            teacher_width=_head_width(teacher),
            student_tokenizer=_tokenizer(student_processor),
            teacher_tokenizer=_tokenizer(self._processor),
            teacher_embeddings=_embeddings(teacher),
        )
        if infer_or_none(student) == "ctc" and student_blank != teacher_blank:
            raise TeacherError(
                f"student and teacher have different CTC blanks: pad_token_id {student_blank} and {teacher_blank}."
            )

    def _check_inputs(self, student: Any, teacher: Any, task: Task, student_processor: Any) -> None:
        """Whether the teacher can read what the student reads; decided here, enforced on every batch."""
        ours, theirs = _tokenizer(student_processor), _tokenizer(self._processor)
        difference = None
        if ours is not None and theirs is not None:
            difference = tokenizer_difference(ours, theirs)
        elif task.matched_by != "vocabulary":
            sizes = _embeddings(student), _embeddings(teacher)
            if None not in sizes and sizes[0] != sizes[1]:
                difference = f"they embed {sizes[0]} and {sizes[1]} tokens"
        if difference is None:
            return
        if task.needs_same_inputs:
            raise TeacherError(
                f"student and teacher have different tokenizers: {difference}. A {task.kind} head predicts positions "
                "of the input, so both must read the same one. Use a teacher with the student's tokenizer, or build "
                "the student from the teacher. (If only padded rows of the embeddings differ, pass processing_class= "
                "and teacher_processing_class=.)"
            )
        self._reads_its_own = True


def infer_or_none(model: Any) -> str | None:
    try:
        return infer_kind(model)
    except SettingError:
        return None


def _refuse_other_width(student: Any, teacher: Any) -> None:
    if student.hidden_size != teacher.hidden_size:
        raise TeacherError(
            f"student and teacher embed in different widths ({student.hidden_size} and {teacher.hidden_size}), which "
            "an embedding cannot bridge by itself. Give the student the teacher's hidden_size."
        )


def _head_width(model: Any) -> int:
    head = model.get_output_embeddings()
    head = getattr(model, "lm_head", None) if head is None else head
    if head is not None and getattr(head, "weight", None) is not None:
        return int(head.weight.shape[0])
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _embeddings(model: Any) -> int | None:
    """How many input ids a model of text can read; None for speech and images."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    embeddings = model.get_input_embeddings()
    weight = getattr(embeddings, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None


def _tokenizer(processor: Any) -> Any:
    """The tokenizer in a processor, or the tokenizer itself; None for what has none."""
    processor = getattr(processor, "tokenizer", processor)
    return processor if hasattr(processor, "get_vocab") else None
