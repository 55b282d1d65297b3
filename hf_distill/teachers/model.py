"""ModelTeacher: a model as teacher. Before the training it decides whether this model can teach the student."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakSet

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill._compat import prepare_for_evaluation
from hf_distill._types import Keywords, ProcessingClass
from hf_distill.errors import DataError, HfDistillError, SettingError, TeacherError
from hf_distill.models.capture import ActivationCapture
from hf_distill.models.output_head import OutputHead
from hf_distill.signals import DeferredLogits, Needs, Signals
from hf_distill.tasks import TASKS, Batch, Task
from hf_distill.tasks.base import MAIN_INPUTS, TEACHER_PREFIX, own_copies, reading_outputs_of
from hf_distill.tasks.infer import config_of, forward_names, infer_kind, main_input_of, unwrapped
from hf_distill.tasks.language import OwnDecoderInputs
from hf_distill.teachers import failures
from hf_distill.teachers.base import Teacher, TeacherSetup, embedded_tokens, output_head_of, text_config_of
from hf_distill.teachers.load import find_tokenizer
from hf_distill.teachers.padding import OwnPadding
from hf_distill.vocabulary import (
    HeadAlignment,
    LabelMatching,
    is_trimmed,
    match_labels,
    match_vocabularies,
    reads_ids_of,
    tokenizer_difference,
)

logger = logging.getLogger(__name__)

Tokenizer: TypeAlias = PreTrainedTokenizerBase | None
"""A tokenizer, or None if it is not known."""

_WARNED_ABOUT: WeakSet[nn.Module] = WeakSet()  # teachers whose tokenizer is not known
_LABELS = ("labels", "start_positions", "end_positions")


# Whether a model can teach a student.


def check_separate_weights(student: nn.Module, teacher: nn.Module) -> None:
    """Raise TeacherError if freezing the teacher would freeze the student."""
    theirs = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in theirs]
    if student is not teacher and not shared:
        return
    has_adapters = any(hasattr(module, "base_layer") for module in student.modules())  # PEFT puts them into the base
    advice = (
        "The student has adapters: if its own base is the teacher, pass teacher_model=BaseModelTeacher()."
        if has_adapters
        else "Load the teacher separately, or pass copy.deepcopy(model)."
    )
    fault = "are the same object" if student is teacher else f"share weights ({shared[0]} and {len(shared) - 1} more)"
    raise TeacherError(f"student and teacher {fault}, so training one changes the other. {advice}")


def check_same_head(teacher: nn.Module, task: Task) -> None:
    """Raise TeacherError if the teacher's class has another kind of head; a custom Task may read any class."""
    try:
        kind = infer_kind(teacher)
    except SettingError:  # not a class of transformers; its outputs will show what it is
        return
    if not task.inferred or TASKS[kind] is type(task):
        return
    article = "an" if kind[0] in "aeiou" else "a"
    can_generate = TASKS[kind].generates and (task.generates or task.axis == "frames")
    advice = ", or train on this teacher's own texts: hf_distill.generate_completions" if can_generate else ""
    raise TeacherError(
        f"the teacher ({type(teacher).__name__}) has {article} {kind} head, the student needs a teacher for {task}. "
        f"Fine-tune a teacher with the student's kind of head{advice}; or pass task= a custom Task that reads both."
    )


def matched_columns(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    task: Task,
    *,
    tokenizers: tuple[Tokenizer, Tokenizer],
    label_matching: LabelMatching,
) -> HeadAlignment:
    """Return the columns that both heads predict.

    Args:
        student: the student, unwrapped.
        teacher: the teacher, unwrapped.
        task: the student's task.
        tokenizers: the student's and the teacher's.
        label_matching: how labels are matched.

    Raises:
        TeacherError: if the heads predict different things.
    """
    if task.matched_by == "labels":
        ours, theirs = config_of(student), config_of(teacher)
        if ours is not None and theirs is not None:
            return match_labels(ours, theirs, matching=label_matching)
        if label_matching == "by_name":
            nameless = type(student if ours is None else teacher).__name__
            raise TeacherError(
                f"{nameless} has no config, so its labels have no names. Give it one with label2id, or pass "
                'label_matching="by_index" if the order is the same (in a custom loop, to ModelTeacher).'
            )
    alignment = HeadAlignment()
    if task.matched_by == "vocabulary":
        student_width, teacher_width = head_width(student), head_width(teacher)
        if student_width is None or teacher_width is None:
            return alignment  # the rows themselves are compared at the first step
        alignment = match_vocabularies(
            student_width=student_width,
            teacher_width=teacher_width,
            student_tokenizer=tokenizers[0],
            teacher_tokenizer=tokenizers[1],
            teacher_embeddings=_embedded_text_tokens(teacher),
        )
    task.check_heads(student, teacher)
    return alignment


def known_columns(task: Task, tokenizers: tuple[Tokenizer, Tokenizer]) -> HeadAlignment:
    """Return the columns that each model's own tokenizer can write, for heads that are not compared."""
    if task.matched_by != "vocabulary":
        return HeadAlignment()
    return HeadAlignment(*(None if one is None else max(one.get_vocab().values()) + 1 for one in tokenizers))


class InputDifference(NamedTuple):
    """Why a teacher may not read the student's input ids.

    Attributes:
        reason: the difference.
        missing: the arguments that would let the tokenizers be compared; empty if they were compared.
    """

    reason: str
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.missing:
            return f"student and teacher have different tokenizers: {self.reason}."
        return (
            f"{self.reason}, and their tokenizers were not compared. If both have the same tokenizer (and only "
            f"the embeddings are padded differently), pass {' and '.join(self.missing)}."
        )


def input_difference(
    student: nn.Module, teacher: nn.Module, task: Task, *, tokenizers: tuple[Tokenizer, Tokenizer]
) -> InputDifference | None:
    """Return why the teacher cannot read the student's input ids, or None if no reason is known."""
    ours, theirs = tokenizers
    ours_embedded, theirs_embedded = _embedded_text_tokens(student), _embedded_text_tokens(teacher)
    is_text = ours_embedded is not None and theirs_embedded is not None
    over_vocabulary = task.matched_by == "vocabulary"
    if ours is not None and theirs is None and (is_text or over_vocabulary) and teacher not in _WARNED_ABOUT:
        _WARNED_ABOUT.add(teacher)  # once, also in a training of several stages
        logger.warning(
            "The teacher's tokenizer is not known, so it was not compared with the student's. If they differ, the "
            "student learns from misread text: pass teacher_processing_class= to have it checked."
        )
    if ours_embedded is None or theirs_embedded is None:
        return None
    if ours is None or theirs is None:
        if over_vocabulary or ours_embedded == theirs_embedded:
            return None
        arguments = {"processing_class=": ours, "teacher_processing_class=": theirs}
        return InputDifference(
            f"student and teacher embed {ours_embedded} and {theirs_embedded} tokens",
            tuple(name for name, tokenizer in arguments.items() if tokenizer is None),
        )
    last = max(ours.get_vocab().values())
    if last >= theirs_embedded:
        return InputDifference(f"the student's tokenizer makes ids up to {last}, the teacher embeds {theirs_embedded}")
    difference = tokenizer_difference(ours, theirs)
    return None if difference is None else InputDifference(difference)


def tokenizer_in(processing_class: ProcessingClass | None) -> Tokenizer:
    """Return the tokenizer in a processor, or the tokenizer itself; None if there is none."""
    tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
    return tokenizer if hasattr(tokenizer, "get_vocab") else None


def tokenizer_of(model: nn.Module) -> Tokenizer:
    """Return the tokenizer in a model's checkpoint: in its folder or the local Hub cache. Nothing is downloaded."""
    origin = getattr(config_of(model), "_name_or_path", None)
    return None if not origin or is_trimmed(model) else find_tokenizer(origin, download=False)


def head_width(model: nn.Module) -> int | None:
    """Return the number of columns of a head over a vocabulary, or None if that is not known."""
    head = output_head_of(model) or getattr(model, "lm_head", None)
    weight = getattr(head, "weight", None)
    if weight is not None:
        return int(weight.shape[0])
    return getattr(text_config_of(model, decoder=True), "vocab_size", None)


def _embedded_text_tokens(model: nn.Module) -> int | None:
    """Return how many input ids a text model reads; None for speech and images, and if that is not known."""
    return embedded_tokens(model) if main_input_of(model) == "input_ids" else None


class ModelTeacher(Teacher):
    """A transformers model, or any module that takes keywords and returns an output with logits.

    The model is frozen in place (`requires_grad_(False)`, `eval()`) before its first use. If the batch has its main
    input as a `teacher_*` column, it reads these columns, else the student's. A head that classifies whole texts
    predicts each row as it would without padding, whatever the padding token; a decoder begins with its own start
    token.

    Args:
        model: the model.
        processing_class: its tokenizer or feature extractor, if it differs from the student's.
        label_matching: "by_name" or "by_index".
        dtype: a dtype to cast it to, or "auto" to keep its own. Either way it does not run under the student's mixed
            precision.
    """

    capture: ActivationCapture

    def __init__(
        self,
        model: nn.Module,
        *,
        processing_class: ProcessingClass | None = None,
        label_matching: LabelMatching = "by_name",
        dtype: torch.dtype | str | None = None,
    ) -> None:
        self.model = model
        self.alignment = HeadAlignment()
        self._processing_class = processing_class
        self._label_matching = label_matching
        self._dtype = dtype
        self._is_frozen = False
        self._accelerator: Accelerator | None = None
        self._difference: InputDifference | None = None  # why it may not read the student's ids
        self.capture = ActivationCapture(model, "teacher")
        self._head: OutputHead | None = None
        self.inputs = tuple(name for name in forward_names(model) if name not in _LABELS)
        self._main = main_input_of(model)
        self._padding: OwnPadding | None = None  # None: it pads as the student does
        self._decoder_inputs: OwnDecoderInputs | None = None  # None: the student's rule makes them

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        self._freeze()
        self._set_mode()
        inputs = self._model_inputs(batch)
        with torch.no_grad(), self._forward_of(inputs, batch), contextlib.ExitStack() as hooks:
            head = self._head_for(inputs) if needs.logits and needs.deferred else None
            deferred: list[DeferredLogits] = []
            captured: dict[Any, Any] = {}
            if needs.activations:
                captured = hooks.enter_context(self.capture.capture(needs.activations))
            if head is not None:
                hooks.enter_context(head.listened(deferred))
            outputs = self.model(**inputs)
        if head is not None:
            return Signals(None, alignment=self.alignment, activations=captured, deferred=deferred[0])
        logits = self._predictions(outputs, task, batch) if needs.logits else None
        return Signals(logits=logits, alignment=self.alignment, activations=captured)

    def bind(self, setup: TeacherSetup) -> None:
        """Check that this model can teach the student, and align their heads. See `Teacher.bind`.

        Raises:
            TeacherError: if both share weights, or heads, labels, vocabularies or inputs do not match.
        """
        student, teacher, task = unwrapped(setup.student), unwrapped(self.model), setup.task
        check_separate_weights(student, teacher)
        if setup.compares_predictions:
            check_same_head(teacher, task)
        ours, theirs = tokenizer_in(setup.processing_class), self.tokenizer
        if theirs is None and reads_ids_of(student, teacher):
            theirs = ours
        if setup.compares_predictions:
            self.alignment = matched_columns(
                student, teacher, task, tokenizers=(ours, theirs), label_matching=self._label_matching
            )
        else:
            self.alignment = known_columns(task, (ours, theirs))
        difference = input_difference(student, teacher, task, tokenizers=(ours, theirs))
        needs_same_inputs = task.needs_same_inputs and setup.compares_predictions
        if difference is not None and (needs_same_inputs or setup.same_inputs):
            reader = f"A {task} head predicts" if needs_same_inputs else "An objective compares"
            raise TeacherError(
                f"{difference} {reader} positions of the input, so both models must read the same input. Use a teacher "
                "with the student's tokenizer, or build the student from the teacher."
            )
        self._difference = difference
        self.prepare_inputs(student, task, tokenizer=theirs or ours)
        task.learn_from(config_of(teacher))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was passed, or that of the model's checkpoint; None if it is not known."""
        return tokenizer_in(self._processing_class) or tokenizer_of(unwrapped(self.model))

    def prepare_inputs(self, student: nn.Module, task: Task, *, tokenizer: Tokenizer = None) -> None:
        """Find out where this model needs other inputs than the student: padding, and the start of a decoder.

        Args:
            student: the student.
            task: the student's task.
            tokenizer: the tokenizer of the teacher's inputs, or None if unknown.
        """
        teacher = unwrapped(self.model)
        self._padding = self._decoder_inputs = None
        if task.reads_whole_input:
            self._padding = OwnPadding(teacher, getattr(tokenizer, "pad_token_id", None))
        if task.has_decoder:
            rules = OwnDecoderInputs(unwrapped(student), teacher)
            if rules.differ():
                self._decoder_inputs = rules
                logger.info(
                    f"Each decoder begins with its own start token: of labels 5, 6, 7 the student makes {rules.ours}, "
                    f"the teacher {rules.theirs}."
                )

    def to(self, accelerator: Accelerator) -> None:
        self._freeze()
        self._accelerator = accelerator
        self.model = prepare_for_evaluation(self.model, accelerator)

    def models(self) -> list[nn.Module]:
        return [self.model]

    @property
    def fixed_temperature(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(unwrapped(self.model)).__name__})"

    def _predictions(self, outputs: Any, task: Task, batch: Batch) -> Tensor:
        with reading_outputs_of(unwrapped(self.model), "teacher"):
            return task.read(outputs, batch, self.alignment, teacher=True)

    def _head_for(self, inputs: Keywords) -> OutputHead | None:
        """Return the output head, if hidden states and head can replace the logits."""
        if self._head is None:
            head = OutputHead(self.model)
            if head.refusal is None and head.is_sharded():
                head.refusal = "its head is sharded, and would be sharded again before it is used"
            elif head.refusal is None:
                result = head.trial(inputs, {})
                head.refusal = result if isinstance(result, str) else None
            if head.refusal is not None:
                logger.info(f"The teacher's logits are computed in full: {head.refusal}.")
            self._head = head
        return None if self._head.refusal is not None else self._head

    def _freeze(self) -> None:
        """Freeze and cast before the first use, so that a failed setup leaves the user's model unchanged."""
        if self._is_frozen:
            return
        self.model.requires_grad_(False)
        self.model.eval()
        if isinstance(self._dtype, torch.dtype):
            self.model.to(self._dtype)
        self._is_frozen = True

    def _set_mode(self) -> None:
        if any(module.training for module in self.model.modules()):
            self.model.eval()

    def _parameter_dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)

    @contextlib.contextmanager
    def _forward_of(self, inputs: Keywords, batch: Batch) -> Iterator[None]:
        """Run a forward in the right precision and padding, and explain an error that it raises."""
        accelerator, full = self._accelerator, self._parameter_dtype() == torch.float32
        try:
            with contextlib.ExitStack() as contexts:
                if accelerator is not None and self._dtype is None and full:  # the student's mixed precision
                    contexts.enter_context(accelerator.autocast())
                if self._padding is not None:
                    contexts.enter_context(self._padding.in_config())
                yield
        except HfDistillError:
            raise
        except failures.FAILURES as error:
            if failures.is_out_of_memory(error):
                raise
            reads_own = f"{TEACHER_PREFIX}{self._main}" in batch
            raise failures.explain(error, self.model, inputs, own=reads_own) from error

    def _model_inputs(self, batch: Batch) -> Keywords:
        """Return the arguments of the model's forward, with speech and image features in the dtype of its weights."""
        dtype = self._parameter_dtype()
        inputs = {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self._inputs(batch).items()
        }
        return inputs if self._padding is None else self._padding.apply(inputs, self._main)

    def _inputs(self, batch: Batch) -> Keywords:
        if self._decoder_inputs is not None and batch.get("decoder_input_ids") is not None:
            batch = {**batch, "decoder_input_ids": self._decoder_inputs.of(batch)}
        own = {
            name.removeprefix(TEACHER_PREFIX): value for name, value in batch.items() if name.startswith(TEACHER_PREFIX)
        }
        if "decoder_input_ids" in batch:
            own.setdefault("decoder_input_ids", batch["decoder_input_ids"])
        main = self._main
        source: Batch = own if main in own else batch
        # A forward that names no argument gets all that the student gets.
        known = self.inputs or tuple(n for n in source if n not in _LABELS and not n.startswith(TEACHER_PREFIX))
        inputs = {name: source[name] for name in known if source.get(name) is not None}
        if main not in inputs and "inputs_embeds" not in inputs and (self.inputs or not inputs):
            raise self._missing_input(batch)
        if self._difference is not None and source is batch:
            raise DataError(
                f"the teacher ({type(unwrapped(self.model)).__name__}) may misread the student's {main}: "
                f"{self._difference} {'Else give' if self._difference.missing else 'Give'} the dataset a column "
                f"{TEACHER_PREFIX}text (or {TEACHER_PREFIX}{main}) and pass teacher_processing_class=."
            )
        inputs = own_copies(inputs)
        if "use_cache" in self.inputs:  # a cache costs memory, and hides packed sequences from transformers
            inputs["use_cache"] = False
        return inputs

    def _missing_input(self, batch: Batch) -> DataError:
        """Return the error for a batch without this model's main input."""
        model, main = unwrapped(self.model), self._main
        column = f"{TEACHER_PREFIX}{main}"
        if main == "features" or any(cls.__name__ == "SentenceTransformer" for cls in type(model).__mro__):
            advice = (
                "Instead of a SentenceTransformer pass the transformers model in it, model[0].auto_model, and "
                "task=hf_distill.tasks.Embedding(pooling=...) as it pools."
            )
        elif main not in MAIN_INPUTS:
            advice = (
                f"Give the dataset a column {column}, or pass a module whose forward takes columns of the batch by "
                'name and returns {"logits": ...}.'
            )
        else:
            advice = (
                f"Give the dataset a column {column}, or {TEACHER_PREFIX}text, {TEACHER_PREFIX}audio or "
                f"{TEACHER_PREFIX}image with teacher_processing_class=, and keep it in map() and your collator; "
                "remove_unused_columns does not remove it."
            )
        return DataError(f"the teacher ({type(model).__name__}) needs {main}, the batch has {sorted(batch)}. {advice}")
