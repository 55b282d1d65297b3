"""What of a dataset reaches the models: the student's columns, as in `Trainer`, the teacher's own, labels and masks.

Columns of other tools that would change the loss, and that nothing reads, are named in a warning.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.utils import find_labels

from hf_distill.data.columns import is_own_collator, refuse_unprocessed, require_label_column, why_not_collated
from hf_distill.data.labels import LabelReader
from hf_distill.errors import DataError, HfDistillError
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.tasks.infer import forward_names, unwrapped
from hf_distill.tasks.unknown import UnknownTask
from hf_distill.trainer.arguments import setting
from hf_distill.trainer.collators import ANSWER_MASKS, RAW, AnswerMaskCollator

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object
logger = logging.getLogger(__name__)
_TRAINED_ON, _EVALUATED_ON = "the training data", "the evaluation data"
_OF_ONE_TEACHER = re.compile(rf"{TEACHER_PREFIX}\d+_.+")
# What other tools call a teacher's predictions, beside all that begins with teacher_.
_VALUES = re.compile(r"(top_?k?_)?(logits|log_?probs|log_?probabilities|probs)|soft_(labels|targets)|prompt_logprobs")


class ReadingCollator:
    """The user's collator, given labels that are numbers; where it cannot pad, the error says so.

    Args:
        collator: makes a batch of examples.
        reader: of the labels of the dataset that the examples are of.
        kind: of the student's task.
    """

    def __init__(self, collator: Callable[..., Any], reader: LabelReader, kind: str) -> None:
        self.collator = collator
        self.reader = reader
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        """Whatever is asked of the user's collator (`tokenizer`, say) is asked of it still."""
        if name in ("collator", "reader", "kind"):  # not there yet: being unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: Sequence[Any]) -> Any:
        features = self.reader(features)
        try:
            return self.collator(features)
        except HfDistillError:
            raise
        except (ValueError, TypeError) as error:
            why = why_not_collated(features, self.collator, self.kind)
            if why is None:
                raise
            raise DataError(why) from error


class ColumnsMixin(_Trainer):
    """Keeps the columns that the teacher reads, reads labels as the student numbers them, and masks of answers."""

    distiller: Any
    _signature_columns: Any
    _labels_have_own_loss: bool
    _users_code_reads_labels: Callable[[Any], bool]
    _readers: list[tuple[Any, bool, LabelReader]]  # a dataset, whether it is trained on, and what reads its labels
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

    # Labels.

    def _look_at_data(self, model: Any, args: Any, given: Mapping[str, Any]) -> None:
        """Look at the datasets before the training: whether the student can read them, and what their labels are.

        Args:
            model: the student.
            args: the training's arguments; None: transformers' defaults.
            given: arguments of `Trainer`: train_dataset, eval_dataset (one, or several by name), data_collator (None:
                transformers chooses), compute_loss_func.

        Raises:
            DataError: the student cannot read a dataset, or its labels.
        """
        self._readers = []
        self._labels_have_own_loss = self._users_code_reads_labels(given.get("compute_loss_func"))
        collator, evaluated = given.get("data_collator"), given.get("eval_dataset")
        evaluated = evaluated if isinstance(evaluated, dict) else {"": evaluated}
        named = {f"{_EVALUATED_ON}{f' {name!r}' if name else ''}": data for name, data in evaluated.items()}
        for whose, data in {_TRAINED_ON: given.get("train_dataset"), **named}.items():
            if data is None:
                continue
            drops = args is None or args.remove_unused_columns
            refuse_unprocessed(data, model, whose=whose, collator=collator, drops_columns=drops)
            if whose == _TRAINED_ON and collator is None and self._needs_label_column(data, model, args):
                config = getattr(unwrapped(model), "config", None)
                require_label_column(data, self.distiller.task, config, whose=whose)
            if self._reads_labels():
                reader = self._reader_of(data, model, args, whose, collator)
                self._readers.append((data, whose == _TRAINED_ON, reader))

    def _reads_labels(self) -> bool:
        """Whether labels can be read as the student numbers them: its task is known, and calls them as it does.

        A base trainer may make data loaders before there is a distiller.
        """
        distiller = getattr(self, "distiller", None)
        return not (distiller is None or isinstance(distiller.task, UnknownTask) or distiller.has_other_label_names())

    def _needs_label_column(self, data: Any, model: Any, args: Any) -> bool:
        """Whether a training on this dataset is impossible without a column of the task's labels."""
        distiller = self.distiller
        task, alone = distiller.task, distiller.compares_nothing()
        own = find_labels(type(unwrapped(model))) if args is None or args.label_names is None else args.label_names
        if not distiller.needs_labels() or distiller.has_other_label_names():
            return False
        if alone and not set(task.label_names) <= set(own):  # the student's own loss may need none
            return False
        return not (task.kind == "causal_lm" and not alone and set(ANSWER_MASKS) & set(columns_of(data)))

    def _reader_of(self, data: Any, model: Any, args: Any, whose: str, collator: Any) -> LabelReader:
        task, trains = self.distiller.task, whose == _TRAINED_ON
        reader = LabelReader(
            task,
            getattr(unwrapped(model), "config", None),
            data,
            whose=whose,
            label_matching=setting(args, "label_matching"),
            as_trainer=not self.distiller.blending.ever_active(),
            evaluates=not trains,
            needed=not trains or self.distiller.needs_labels() or task.kind not in ("classification", "regression"),
            own_loss=self._labels_have_own_loss,
            own_collator=is_own_collator(collator),
        )
        if args is None or args.process_index == 0:
            for remark in reader.remarks:
                logger.warning(remark)
        return reader

    def get_train_dataloader(self) -> Any:
        """As the trainer's own, with the labels read as the student numbers them."""
        with self._reading_labels(self.train_dataset, _TRAINED_ON) as reader:
            if reader is not None and self.distiller.needs_labels():
                self.distiller.task.learn_names(reader.names)
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As `get_train_dataloader`."""
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        data = self.eval_dataset[data] if isinstance(data, str) else data  # type: ignore[index]  # several, by name
        with self._reading_labels(data, _EVALUATED_ON):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `get_train_dataloader`."""
        with self._reading_labels(test_dataset, _EVALUATED_ON):
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _reading_labels(self, data: Any, whose: str) -> Iterator[LabelReader | None]:
        if not self._reads_labels():
            yield None
            return
        trains = whose == _TRAINED_ON
        known = [reader for one, of_training, reader in self._readers if one is data and of_training == trains]
        reader = known[0] if known else self._reader_of(data, self.model, self.args, whose, self.data_collator)
        kept, self.data_collator = (
            self.data_collator,
            ReadingCollator(self.data_collator, reader, self.distiller.task.kind),
        )
        try:
            yield reader
        finally:
            self.data_collator = kept


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
