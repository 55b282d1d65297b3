"""What of a dataset reaches the models: the student's columns, as in `Trainer`, the teacher's own, and labels."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from hf_distill.arguments import setting
from hf_distill.errors import DataError, HfDistillError
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.tasks.dataset_columns import is_own_collator, refuse_unprocessed, require_label_column, why_not_collated
from hf_distill.tasks.dataset_labels import LabelReader
from hf_distill.tasks.infer import unwrapped
from hf_distill.trainer_parts.collation import RAW

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object
logger = logging.getLogger(__name__)
_TRAINED_ON, _EVALUATED_ON = "the training data", "the evaluation data"


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
    """Keeps what the teacher reads, and reads the labels of each dataset as the student numbers them."""

    distiller: Any
    _signature_columns: Any
    _labels_have_own_loss: bool
    _users_code_reads_labels: Callable[[Any], bool]
    _readers: list[tuple[Any, bool, LabelReader]]  # a dataset, whether it is trained on, and what reads its labels

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
            if whose == _TRAINED_ON and collator is None and self.distiller.needs_labels():
                config = getattr(unwrapped(model), "config", None)
                require_label_column(data, self.distiller.task, config, whose=whose)
            reader = self._reader_of(data, model, args, whose, collator)
            self._readers.append((data, whose == _TRAINED_ON, reader))

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
            if self.distiller.needs_labels():
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
    def _reading_labels(self, data: Any, whose: str) -> Iterator[LabelReader]:
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


def _columns_of(data: Any) -> Iterable[str]:
    """Of a list the first example's: it is not drawn by being looked at."""
    if isinstance(data, (list, tuple)) and data and isinstance(data[0], Mapping):
        return data[0]
    return getattr(data, "column_names", None) or ()
