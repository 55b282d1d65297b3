"""Whether a model can teach a student, and which columns of their heads mean the same; decided before training."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from hf_distill._compat import prepare_for_evaluation
from hf_distill.errors import DataError, HfDistillError, SettingError, TeacherError
from hf_distill.models.capture import ActivationCapture
from hf_distill.models.output_head import OutputHead
from hf_distill.signals import DeferredLogits, Needs, Signals
from hf_distill.tasks import TASKS, Batch, Task
from hf_distill.tasks.base import MAIN_INPUTS, TEACHER_PREFIX, own_copies, reading_outputs_of
from hf_distill.tasks.infer import forward_names, infer_kind, main_input_of, unwrapped
from hf_distill.tasks.language import OwnDecoderInputs
from hf_distill.teachers import failures
from hf_distill.teachers.base import Teacher, TeacherSetup
from hf_distill.teachers.load import find_tokenizer
from hf_distill.teachers.padding import OwnPadding
from hf_distill.vocabulary import (
    HeadAlignment,
    is_trimmed,
    match_labels,
    match_vocabularies,
    reads_ids_of,
    tokenizer_difference,
)

logger = logging.getLogger(__name__)
_WARNED_OF: WeakSet[Any] = WeakSet()  # teachers whose tokenizer is not known
Tokenizers = tuple[Any, Any]  # the student's and the teacher's, None where not known


def check_separate_weights(student: nn.Module, teacher: nn.Module) -> None:
    if student is teacher:
        raise TeacherError(
            "student and teacher are the same object, so there is nothing to learn and freezing the one freezes the "
            f"other. {_of_one_base(student)}Load the teacher apart, or pass copy.deepcopy(model)."
        )
    theirs = {id(p) for p in teacher.parameters()}
    shared = [name for name, p in student.named_parameters() if id(p) in theirs]
    if shared:
        raise TeacherError(
            f"student and teacher share weights ({shared[0]} and {len(shared) - 1} more): training the one changes "
            f"the other. {_of_one_base(student)}Load the teacher apart."
        )


def _of_one_base(student: nn.Module) -> str:
    """What to do where the student is a base with adapters, which PEFT puts into the base itself."""
    if not any(hasattr(module, "base_layer") for module in student.modules()):
        return ""
    return "The student has adapters: for its own base as teacher pass teacher_model=BaseModelTeacher(). "


def check_same_head(teacher: nn.Module, task: Task) -> None:
    """Raise TeacherError for a class of another kind of head; a Task of the user's may read any class."""
    kind = _kind_or_none(teacher)  # None: not a class of transformers; its outputs will tell
    if task.inferred and kind is not None and TASKS[kind] is not type(task):
        article = "an" if str(kind)[0] in "aeiou" else "a"
        by_texts = kind is not None and TASKS[kind].generates and (task.generates or task.axis == "frames")
        way_out = ", or train on texts that this one writes: hf_distill.generate_completions" if by_texts else ""
        raise TeacherError(
            f"the teacher ({type(teacher).__name__}) has {article} {kind} head, the student needs a teacher for "
            f"{task}. Fine-tune a teacher with the student's kind of head{way_out}; or pass task= an object "
            "derived from hf_distill.tasks.Task that reads the outputs of both."
        )


def matched_columns(
    student: Any, teacher: Any, task: Task, *, tokenizers: Tokenizers, label_matching: str
) -> HeadAlignment:
    """The columns that both heads predict.

    Raises:
        TeacherError: they predict different things.
    """
    configs = [getattr(model, "config", None) for model in (student, teacher)]
    if task.matched_by == "labels":
        if None not in configs:
            return match_labels(*configs, matching=label_matching)
        if label_matching == "by_name":
            nameless = type(student if configs[0] is None else teacher).__name__
            raise TeacherError(
                f"{nameless} has no config, so its labels have no names. Give it one with label2id, or, if the order "
                'is the same, pass label_matching="by_index" (in a loop of your own to ModelTeacher).'
            )
    if task.matched_by == "vocabulary":
        return _matched_vocabulary(student, teacher, task, tokenizers)
    task.check_heads(student, teacher)
    return HeadAlignment()


def _matched_vocabulary(student: Any, teacher: Any, task: Task, tokenizers: Tokenizers) -> HeadAlignment:
    widths = _head_width(student), _head_width(teacher)
    if widths[0] is None or widths[1] is None:
        return HeadAlignment()  # a head that is not found: the rows themselves are compared at the first step
    ours, theirs = tokenizers
    columns = match_vocabularies(
        student_width=widths[0],
        teacher_width=widths[1],
        student_tokenizer=ours,
        teacher_tokenizer=theirs,
        teacher_embeddings=_embeddings(teacher),
    )
    task.check_heads(student, teacher)
    return columns


def known_columns(task: Task, tokenizers: Tokenizers) -> HeadAlignment:
    """Of heads whose columns are not paired: over a vocabulary, those that each one's own tokenizer can write."""
    if task.matched_by != "vocabulary":
        return HeadAlignment()
    known = [None if one is None else max(one.get_vocab().values()) + 1 for one in tokenizers]
    return HeadAlignment(*known)


class InputDifference(NamedTuple):
    """Why a teacher may not read the student's input ids.

    Attributes:
        words: what differs.
        missing: the arguments by which the tokenizers would be compared; empty where they were.
    """

    words: str
    missing: tuple[str, ...] = ()

    def sentence(self) -> str:
        """What is known, and the near way out where it is not known enough."""
        if not self.missing:
            return f"student and teacher have different tokenizers: {self.words}."
        return (
            f"{self.words}, and their tokenizers were not compared. If both have the same tokenizer (and only "
            f"the embeddings are padded differently), pass {' and '.join(self.missing)}."
        )


def input_difference(student: Any, teacher: Any, task: Task, *, tokenizers: Tokenizers) -> InputDifference | None:
    """Why the teacher cannot read the student's input ids; None where nothing says so."""
    ours, theirs = tokenizers
    ours_embedded, theirs_embedded = _embeddings(student), _embeddings(teacher)
    is_text = ours_embedded is not None and theirs_embedded is not None  # else sound or images
    if ours is not None and theirs is None and (is_text or task.matched_by == "vocabulary"):
        _warn_of_unknown_tokenizer(teacher)
    if ours_embedded is None or theirs_embedded is None:
        return None
    if ours is None or theirs is None:
        if task.matched_by == "vocabulary" or ours_embedded == theirs_embedded:
            return None
        missing = {"processing_class=": ours, "teacher_processing_class=": theirs}
        return InputDifference(
            f"student and teacher embed {ours_embedded} and {theirs_embedded} tokens",
            tuple(name for name, tokenizer in missing.items() if tokenizer is None),
        )
    last = max(ours.get_vocab().values())
    if last >= theirs_embedded:
        return InputDifference(f"the student's tokenizer makes ids up to {last}, the teacher embeds {theirs_embedded}")
    difference = tokenizer_difference(ours, theirs)
    return None if difference is None else InputDifference(difference)


def _warn_of_unknown_tokenizer(teacher: Any) -> None:
    """Once for each teacher: a training in stages asks again at each of them."""
    if teacher in _WARNED_OF:
        return
    _WARNED_OF.add(teacher)
    logger.warning(
        "The teacher's tokenizer is not known, so it was not compared with the student's. If it is another one, "
        "the student learns from misread text: pass teacher_processing_class= to have it checked."
    )


def tokenizer_in(processor: Any) -> Any:
    """The tokenizer in a processor, or the tokenizer itself; None for what has none."""
    processor = getattr(processor, "tokenizer", processor)
    return processor if hasattr(processor, "get_vocab") else None


def tokenizer_of(model: Any) -> Any:
    """The tokenizer beside the checkpoint that a model was loaded from, where that lies on this machine.

    That is its folder, or the local cache of the Hub. Nothing is downloaded.
    """
    origin = getattr(getattr(model, "config", None), "_name_or_path", None)
    return None if not origin or is_trimmed(model) else find_tokenizer(origin, download=False)


def _kind_or_none(model: Any) -> str | None:
    try:
        return infer_kind(model)
    except SettingError:
        return None


def _head_width(model: Any) -> int | None:
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    head = getattr(model, "lm_head", None) if head is None else head
    if head is not None and getattr(head, "weight", None) is not None:
        return int(head.weight.shape[0])
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    width = getattr(text, "vocab_size", None)
    return width if isinstance(width, int) else None


def _embeddings(model: Any) -> int | None:
    """How many input ids a model of text can read; None for speech and images, and where it is not known."""
    find = getattr(model, "get_input_embeddings", None)
    if find is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    try:
        weight = getattr(find(), "weight", None)
    except NotImplementedError:  # CLIP: two towers
        return None
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None


_NEVER_GIVEN = ("labels", "start_positions", "end_positions")


class ModelTeacher(Teacher):
    """A transformers model, or anything that is called with keywords and returns an output with logits.

    The model is frozen in place (`requires_grad_(False)`, `eval()`) once it is put to use. It reads its own inputs,
    `teacher_*` columns with the prefix taken off, where the batch has them, and else the student's. A head that
    classifies whole texts answers each row as it does alone, whatever token the batch is padded with; a decoder begins
    with its own start token.

    Args:
        model: the model.
        processing_class: its tokenizer or feature extractor, where it is not the student's.
        label_matching: "by_name" or "by_index".
        dtype: cast it to this, or keep its own ("auto"); then it does not run under the student's mixed precision.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        processing_class: Any = None,
        label_matching: str = "by_name",
        dtype: Any = None,
    ) -> None:
        self.model: Any = model
        self.alignment = HeadAlignment()
        self._processing_class = processing_class
        self._label_matching = label_matching
        self._dtype = dtype
        self._in_use = False
        self._accelerator: Any = None
        self._difference: InputDifference | None = None  # why it may not read the student's ids
        self.capture: ActivationCapture = ActivationCapture(model, "teacher")
        self._head: OutputHead | None = None
        self.inputs = tuple(name for name in forward_names(model) if name not in _NEVER_GIVEN)
        self._main = main_input_of(model)
        self._padding: OwnPadding | None = None  # None: it pads as the student does
        self._decoder_inputs: OwnDecoderInputs | None = None  # None: it makes the same of the labels as the student

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        if not self._in_use:
            self._put_to_use()
        self._set_mode()
        inputs = self._model_inputs(batch)
        with torch.no_grad(), self._forward_of(inputs, batch):
            head = self._head_for(inputs) if needs.logits and needs.deferred else None
            heard: list[DeferredLogits] = []
            listening = contextlib.nullcontext() if head is None else head.listened(heard)
            keys = needs.activations
            capturing: Any = self.capture.capture(keys) if keys else contextlib.nullcontext({})
            with capturing as activations, listening:
                outputs = self.model(**inputs)
        if head is not None:
            return Signals(None, alignment=self.alignment, activations=activations, deferred=heard[0])
        logits = self._predictions(outputs, task, batch) if needs.logits else None
        return Signals(logits=logits, alignment=self.alignment, activations=activations)

    def bind(self, setup: TeacherSetup) -> None:
        """Check that this model can teach that one, and pair the columns of their heads. See `Teacher.bind`.

        Raises:
            TeacherError: the same object, shared weights, another kind of head, labels or vocabulary that do not match.
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
        needs_same_inputs = task.needs_same_inputs and setup.compares_predictions
        difference = input_difference(student, teacher, task, tokenizers=(ours, theirs))
        if difference is not None and (needs_same_inputs or setup.same_inputs):
            what = f"A {task} head predicts" if needs_same_inputs else "An objective compares"
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
        return tokenizer_in(self._processing_class) or tokenizer_of(unwrapped(self.model))

    def prepare_inputs(self, student: nn.Module, task: Task, *, tokenizer: Any = None) -> None:
        """Find out what this model must be given otherwise than the student: padding, and the start of a decoder.

        Args:
            tokenizer: of the teacher's inputs; None where it is not known.
        """
        teacher = unwrapped(self.model)
        self._padding = self._decoder_inputs = None
        if task.reads_whole_input:
            self._padding = OwnPadding(teacher, getattr(tokenizer, "pad_token_id", None))
        if task.has_decoder:
            found = OwnDecoderInputs(unwrapped(student), teacher)
            if found.differ():
                self._decoder_inputs = found
                logger.info(
                    f"Each decoder begins with its own start token: of labels 5, 6, 7 the student makes {found.ours}, "
                    f"the teacher {found.theirs}."
                )

    def to(self, accelerator: Any) -> None:
        self._put_to_use()
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

    def _head_for(self, inputs: dict[str, Any]) -> OutputHead | None:
        """Return the output head, if hidden states and head can stand for the logits."""
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
        """Return what the model is called with; speech and image features in the dtype of its weights."""
        dtype = self._parameter_dtype()
        inputs = {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self._inputs(batch).items()
        }
        return inputs if self._padding is None else self._padding.written(inputs, self._main)

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
