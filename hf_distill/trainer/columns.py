"""Which columns of a dataset reach the models: the student's, as in `Trainer`, and the teacher's, labels and masks.

A warning names the columns of other tools that look like a teacher's and that nothing reads.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers import TrainingArguments
from transformers.utils import find_labels

from hf_distill._types import Batch, Collator, Data, Example, Keywords
from hf_distill.data.columns import check_processed, is_own_collator, require_label_column, why_not_collated
from hf_distill.data.labels import LabelReader
from hf_distill.errors import DataError, HfDistillError
from hf_distill.tasks import Task
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.tasks.infer import config_of, forward_names, unwrapped
from hf_distill.teachers.base import RAW_INPUTS
from hf_distill.trainer.arguments import setting
from hf_distill.trainer.collators import ANSWER_MASKS, AnswerMaskCollator, WrappingCollator

if TYPE_CHECKING:
    from hf_distill.teachers import Teacher
    from hf_distill.trainer.mixin import DistillationMixin

logger = logging.getLogger(__name__)
TRAINED_ON, EVALUATED_ON = "the training data", "the evaluation data"
_OF_ONE_TEACHER = re.compile(rf"{TEACHER_PREFIX}\d+_.+")
# Names that other tools give to a teacher's predictions, besides those that begin with teacher_.
_VALUES = re.compile(r"(top_?k?_)?(logits|log_?probs|log_?probabilities|probs)|soft_(labels|targets)|prompt_logprobs")


class ReadingCollator(WrappingCollator):
    """Wraps the user's collator: labels are converted to numbers first, and an error of padding is explained.

    Args:
        collator: makes a batch of examples.
        reader: reads the labels of the dataset.
        task: the student's.
    """

    def __init__(self, collator: Collator, reader: LabelReader, task: Task) -> None:
        super().__init__(collator)
        self.reader = reader
        self.task = task

    def __call__(self, features: Sequence[Example]) -> Batch:
        if self.reader.changes:
            features = self.reader(features)
        try:
            return self.collator(features)
        except HfDistillError:
            raise
        except (ValueError, TypeError) as error:
            why = why_not_collated(features, self.collator, self.task)
            if why is None:
                raise
            raise DataError(why) from error


VALUES_AS_TEACHER = (
    "To learn from predictions that you have, pass a Teacher of your own as teacher_model= that returns them from the "
    "batch (docs/teachers.md, 'Predictions that you have'); to keep those of a model, build a TeacherCache."
)


def columns_with_values(columns: Iterable[str]) -> set[str]:
    """Return the columns that look like a teacher's predictions."""
    return {
        name
        for name in columns
        if (name.startswith(TEACHER_PREFIX) or _VALUES.fullmatch(name)) and not _OF_ONE_TEACHER.fullmatch(name)
    }


def columns_of(data: Data | None) -> Iterable[str]:
    """Return the columns of a dataset (of a list, those of its first example) without drawing an example."""
    if isinstance(data, (list, tuple)) and data and isinstance(data[0], Mapping):
        return data[0]
    return getattr(data, "column_names", None) or ()


def _may_hold_masks(data: Data | None) -> bool:
    """Return whether examples have masks of answers, or may have them because their columns are not known."""
    columns = set(columns_of(data))
    return bool(columns & set(ANSWER_MASKS)) if columns else data is not None


def read_by(teacher: Teacher) -> list[str]:
    """Return the names of the columns that a teacher may read."""
    own = (f"{TEACHER_PREFIX}{name}" for name in (*teacher.inputs, "labels", *RAW_INPUTS))
    return [*teacher.inputs, *own]


def datasets_of(trainer: DistillationMixin) -> list[Data | None]:
    return [trainer.train_dataset, *evaluated_by_name(trainer.eval_dataset).values()]


def evaluated_by_name(eval_dataset: Data | dict[str, Data] | None) -> dict[str, Data | None]:
    """Return the datasets of `Trainer(eval_dataset=)` by name; a single one is called ""."""
    return {**eval_dataset} if isinstance(eval_dataset, dict) else {"": eval_dataset}


def known_columns(trainer: DistillationMixin) -> set[str]:
    """Return the columns of all datasets whose columns are known."""
    return {name for data in datasets_of(trainer) for name in columns_of(data)}


def has_teacher_columns(trainer: DistillationMixin) -> bool:
    own = forward_names(trainer.model)
    return any(name.startswith(TEACHER_PREFIX) and name not in own for name in known_columns(trainer))


def collate_answer_masks(trainer: DistillationMixin, *datasets: Data | None) -> None:
    """Wrap the collator so that masks of answers in these datasets become labels."""
    distiller = trainer.distiller
    if trainer._reads_answer_masks or trainer._base_chooses_columns or not any(map(_may_hold_masks, datasets)):
        return
    if not distiller.task.shifts_labels or distiller.compares_nothing:
        return
    of_transformers = getattr(trainer.data_collator, "__module__", "").startswith("transformers.")
    reads_masks = not (trainer.args.remove_unused_columns or of_transformers)
    trainer.data_collator = AnswerMaskCollator(trainer.data_collator, reads_masks=reads_masks)
    trainer._reads_answer_masks, trainer._signature_columns = True, None


def warn_of_unread_columns(trainer: DistillationMixin) -> None:
    """Warn once of columns that look like a teacher's and that nothing reads."""
    columns, teacher = known_columns(trainer), trainer.distiller.teacher
    masks = sorted(columns & set(ANSWER_MASKS) - set(forward_names(trainer.model)))
    if masks and not trainer._reads_answer_masks and not trainer._base_chooses_columns:
        why = "alpha is 0, which is Trainer, and Trainer does not read it"
        if not trainer.distiller.task.shifts_labels:
            why = "it is read for causal language models alone"
        logger.warning(
            f"The dataset has {' and '.join(masks)}, which is not read: {why}. To train on answers alone, give it "
            "labels that are -100 on all other tokens."
        )
    if teacher is not None and teacher.inputs:  # without them it gets every column that begins with teacher_
        values = sorted(columns_with_values(columns) - {*forward_names(trainer.model), *read_by(teacher)})
        if values:
            logger.warning(f"The dataset has {', '.join(values)}, which is not read. {VALUES_AS_TEACHER}")


def check_datasets(
    trainer: DistillationMixin, model: nn.Module, args: TrainingArguments | None, given: Keywords
) -> None:
    """Check before training that the student can read the datasets, and find out how their labels are written.

    Args:
        model: the student.
        args: the training's arguments, or None for transformers' defaults.
        given: arguments of `Trainer`: train_dataset, eval_dataset (one, or several by name), data_collator (None:
            transformers chooses), compute_loss_func.

    Raises:
        DataError: the student cannot read a dataset, or its labels.
    """
    trainer._readers = []
    trainer._labels_have_own_loss = trainer._users_code_reads_labels(given.get("compute_loss_func"))
    collator, evaluated = given.get("data_collator"), evaluated_by_name(given.get("eval_dataset"))
    named = {f"{EVALUATED_ON}{f' {name!r}' if name else ''}": data for name, data in evaluated.items()}
    for whose, data in {TRAINED_ON: given.get("train_dataset"), **named}.items():
        if data is None:
            continue
        drops = args is None or args.remove_unused_columns
        check_processed(data, model, whose=whose, collator=collator, drops_columns=drops)
        if whose == TRAINED_ON and collator is None and _needs_label_column(trainer, data, model, args):
            config = config_of(model)
            require_label_column(data, trainer.distiller.task, config, whose=whose)
        if reads_labels(trainer):
            reader = _reader_of(trainer, data, model, args, whose, collator)
            trainer._readers.append((data, whose == TRAINED_ON, reader))


def reads_labels(trainer: DistillationMixin) -> bool:
    """Return whether labels can be converted to the student's numbering, which needs a known task.

    A base trainer may make data loaders before there is a distiller.
    """
    distiller = getattr(trainer, "distiller", None)
    return distiller is not None and distiller.task.is_known


def _needs_label_column(
    trainer: DistillationMixin, data: Data, model: nn.Module, args: TrainingArguments | None
) -> bool:
    """Return whether training on this dataset needs a column with the task's labels."""
    distiller = trainer.distiller
    task, alone = distiller.task, distiller.compares_nothing
    own = find_labels(type(unwrapped(model))) if args is None or args.label_names is None else args.label_names
    if not distiller.uses_labels or distiller.label_aliases:
        return False
    if alone and not set(task.label_names) <= set(own):  # a student's own loss may need no labels
        return False
    return not (task.shifts_labels and not alone and set(ANSWER_MASKS) & set(columns_of(data)))


def _reader_of(
    trainer: DistillationMixin,
    data: Data | None,
    model: nn.Module,
    args: TrainingArguments | None,
    whose: str,
    collator: Collator | None,
) -> LabelReader:
    task, trains = trainer.distiller.task, whose == TRAINED_ON
    reader = LabelReader(
        task,
        config_of(model),
        data,
        whose=whose,
        aliases=trainer.distiller.label_aliases,
        label_matching=setting(args, "label_matching"),
        as_trainer=not trainer.distiller.blending.ever_active(),
        evaluates=not trains,
        needed=not trains or trainer.distiller.uses_labels or not task.allows_unlabelled,
        own_loss=trainer._labels_have_own_loss,
        own_collator=is_own_collator(collator),
    )
    if args is None or args.process_index == 0:
        for remark in reader.remarks:
            logger.warning(remark)
    return reader


@contextlib.contextmanager
def reading_labels(trainer: DistillationMixin, data: Data | None, whose: str) -> Iterator[LabelReader | None]:
    if not reads_labels(trainer):
        yield None
        return
    trains = whose == TRAINED_ON
    known = [reader for one, of_training, reader in trainer._readers if one is data and of_training == trains]
    reader = known[0] if known else _reader_of(trainer, data, trainer.model, trainer.args, whose, trainer.data_collator)
    kept, trainer.data_collator = (
        trainer.data_collator,
        ReadingCollator(trainer.data_collator, reader, trainer.distiller.task),
    )
    try:
        yield reader
    finally:
        trainer.data_collator = kept
