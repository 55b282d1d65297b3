"""A model as teacher: frozen, in evaluation mode in every step, never seen by the optimizer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill._compat import prepare_for_evaluation
from hf_distill.errors import DataError, HfDistillError, TeacherError
from hf_distill.inside.output_head import OutputHead
from hf_distill.inside.recorder import Inside
from hf_distill.signals import Needs, Signals, Unmade
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import MAIN_INPUTS, TEACHER_PREFIX, own_copies, reading_outputs_of
from hf_distill.tasks.infer import forward_names, main_input_of, unwrapped
from hf_distill.tasks.language import OwnDecoderInputs
from hf_distill.teachers import failures, fitting
from hf_distill.teachers.padding import KINDS, OwnPadding
from hf_distill.vocabulary import Columns, reads_ids_of

logger = logging.getLogger(__name__)
_NEVER_GIVEN = ("labels", "start_positions", "end_positions")


class ModelTeacher:
    """A transformers model, or anything that is called with keywords and returns an output with logits.

    The model is frozen in place (`requires_grad_(False)`, `eval()`) once it is put to use. It reads its own inputs,
    `teacher_*` columns with the prefix taken off, where the batch has them, and else the student's. A head that
    classifies whole texts answers each row as it does alone, whatever token the batch is padded with; a decoder begins
    with its own start token.

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
        self._difference: fitting.InputDifference | None = None  # why it may not read the student's ids
        self.inside = Inside(model, "teacher")
        self._head: OutputHead | None = None
        self.inputs = tuple(name for name in forward_names(model) if name not in _NEVER_GIVEN)
        self._padding: OwnPadding | None = None  # None: it pads as the student does
        self._decoder_inputs: OwnDecoderInputs | None = None  # None: it makes the same of the labels as the student

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        self._put_to_use()
        self._set_mode()
        inputs = self._model_inputs(batch)
        with torch.no_grad(), self._forward_of(inputs, batch):
            head = self._head_for(needs, inputs)
            heard: list[Unmade] = []
            listening = contextlib.nullcontext() if head is None else head.listened(heard)
            with self.inside.reading(needs.reads) as inside, listening:
                outputs = self.model(**inputs)
        if head is not None:
            return Signals(None, columns=self.columns, inside=inside, unmade=heard[0])
        logits = self._predictions(outputs, task, batch) if needs.logits else None
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
        ours, theirs = fitting.tokenizer_in(student_processor), self.tokenizer
        if theirs is None and reads_ids_of(student, teacher):
            theirs = ours
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
                f"{difference.sentence()} {what} positions of the input, so both must read the same one. Use a teacher "
                "with the student's tokenizer, or build the student from the teacher."
            )
        self._difference = difference
        self.prepare_inputs(student, task, tokenizer=theirs or ours)
        task.learn_from(getattr(teacher, "config", None))

    @property
    def tokenizer(self) -> Any:
        """The one it was given, or that lies beside its checkpoint; None where it is not known."""
        return fitting.tokenizer_in(self._processor) or fitting.tokenizer_of(unwrapped(self.model))

    def prepare_inputs(self, student: nn.Module, task: Task, *, tokenizer: Any = None) -> None:
        """Find out what this model must be given otherwise than the student: padding, and the start of a decoder.

        Args:
            tokenizer: of the teacher's inputs; None where it is not known.
        """
        teacher = unwrapped(self.model)
        self._padding = self._decoder_inputs = None
        if task.kind in KINDS:
            self._padding = OwnPadding(teacher, getattr(tokenizer, "pad_token_id", None))
        if task.kind == "seq2seq":
            found = OwnDecoderInputs(unwrapped(student), teacher)
            if found.differ():
                self._decoder_inputs = found
                logger.info(
                    f"Each decoder begins with its own start token: of labels 5, 6, 7 the student makes {found.ours}, "
                    f"the teacher {found.theirs}."
                )

    def place(self, accelerator: Any) -> None:
        self._put_to_use()
        self._accelerator = accelerator
        self.model = prepare_for_evaluation(self.model, accelerator)

    def after_step(self, student: nn.Module) -> None:
        """Nothing: it is frozen."""

    def _predictions(self, outputs: Any, task: Task, batch: Batch) -> Tensor:
        with reading_outputs_of(unwrapped(self.model), "teacher"):
            return task.read(outputs, batch, self.columns, teacher=True)

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

    @contextlib.contextmanager
    def _forward_of(self, inputs: dict[str, Any], batch: Batch) -> Iterator[None]:
        """Around a forward: its precision, its padding, and an error that says whose forward failed on what."""
        try:
            with self._precision(), contextlib.nullcontext() if self._padding is None else self._padding.in_config():
                yield
        except HfDistillError:
            raise
        except failures.FAILURES as error:
            if failures.is_of_memory(error):
                raise
            raise failures.explained(error, self.model, inputs, own=self._reads_own(batch)) from error

    def _model_inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model is called with."""
        inputs = self._in_own_dtype(self._inputs(batch))
        if self._padding is None:
            return inputs
        return self._padding.written(inputs, self._main)

    def _in_own_dtype(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Speech and image features in the dtype of a half-precision teacher."""
        dtype = self._parameter_dtype()
        return {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }

    @property
    def _main(self) -> str:
        """The name of its main input."""
        return main_input_of(self.model)

    def _reads_own(self, batch: Batch) -> bool:
        """Whether the batch has its main input as a column of its own."""
        return f"{TEACHER_PREFIX}{self._main}" in batch

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        if self._decoder_inputs is not None and batch.get("decoder_input_ids") is not None:
            batch = {**batch, "decoder_input_ids": self._decoder_inputs.of(batch)}
        own = {
            name.removeprefix(TEACHER_PREFIX): value for name, value in batch.items() if name.startswith(TEACHER_PREFIX)
        }
        if "decoder_input_ids" in batch:
            own.setdefault("decoder_input_ids", batch["decoder_input_ids"])
        main = self._main
        source: Mapping[str, Any] = own if main in own else batch
        # A forward that names nothing is given whatever the student is given.
        known = self.inputs or tuple(n for n in source if n not in _NEVER_GIVEN and not n.startswith(TEACHER_PREFIX))
        inputs = {name: source[name] for name in known if source.get(name) is not None}
        if main not in inputs and "inputs_embeds" not in inputs and (self.inputs or not inputs):
            raise self._missing_input(main, batch)
        if self._difference is not None and source is batch:
            raise DataError(
                f"the teacher ({type(unwrapped(self.model)).__name__}) may misread the student's {main}: "
                f"{self._difference.sentence()} {'Else give' if self._difference.missing else 'Give'} the dataset a "
                f"column {TEACHER_PREFIX}text (or {TEACHER_PREFIX}{main}); the collator turns it into the teacher's "
                "inputs with teacher_processing_class=."
            )
        inputs = own_copies(inputs)
        if "use_cache" in self.inputs:  # it would cost memory, and hide from transformers where packed sequences end
            inputs["use_cache"] = False
        return inputs

    def _missing_input(self, main: str, batch: Batch) -> DataError:
        """The error for a batch without this model's main input."""
        model = unwrapped(self.model)
        why = f"the teacher ({type(model).__name__}) needs {main}, the batch has {sorted(batch)}."
        if main == "features" or any(cls.__name__ == "SentenceTransformer" for cls in type(model).__mro__):
            return DataError(
                f"{why} Of a SentenceTransformer pass the transformers model in it, model[0].auto_model, and "
                "task=Embedding(pooling=...) of hf_distill.tasks, as it pools."
            )
        if main not in MAIN_INPUTS:
            return DataError(
                f"{why} A teacher is called with columns of the batch by name. Give the dataset a column "
                f"{TEACHER_PREFIX}{main}, or pass a module whose forward takes columns that the batch has and returns "
                '{"logits": ...}.'
            )
        return DataError(
            f"{why} Give the dataset a column {TEACHER_PREFIX}{main}, or {TEACHER_PREFIX}text, {TEACHER_PREFIX}audio "
            f"or {TEACHER_PREFIX}image with teacher_processing_class=; such columns survive remove_unused_columns. If "
            "a map() or a collator of yours dropped it, keep it there."
        )
