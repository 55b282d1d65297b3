"""AugmentingCollator: augmented examples for both models, or for the student only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_distill._types import Batch, Collator, Example
from hf_distill.augment.augmentation import (
    AnyAugmentation,
    after_collation,
    before_collation,
    checked,
    generators_kept,
    name_of,
    seeded,
)
from hf_distill.errors import DataError, SettingError, check_whole_number
from hf_distill.tasks.base import TEACHER_PREFIX

LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")
INPUTS = ("input_ids", "input_values", "input_features", "pixel_values", "inputs_embeds")
OTHER_TOKENS = (
    "student_only=True with an augmentation that may put another word at a token (WordReplacement), and rows that are "
    "tokens: the teacher would predict for other words than the student's. Leave student_only out, so that both models "
    "read the same words."
)


class AugmentingCollator:
    """Wraps a collator and augments the examples of each batch, in the same way for both models.

    With `student_only` the batch also holds the clean example in `teacher_*` columns for the teacher.

    The random numbers depend on the seed, the epoch and the content of the batch only, not on the worker or process
    that collates it or on earlier batches. So a resumed run equals an uninterrupted one, and the generators of the
    training (dropout) are not used. As with dropout, the result depends on how the data is cut into batches.

    With `views=4` each example has four fixed versions that alternate by epoch: the random numbers depend on the seed,
    the number of the version and the example only. Such a collator can build a teacher's cache over the versions.

    Args:
        collator: makes a batch of examples that are mappings.
        augmentations: applied in this order; see `Augmentation`.
        student_only: whether the teacher reads the clean example.
        seed: seed of the augmentations.
        views: number of fixed versions of each example, or None for a new version each time.

    Raises:
        SettingError: if augmentations are missing or invalid, `student_only` is used with one that moves positions, or
            `views` is below 1 or used with one that acts on collated batches.
        DataError: when called, if the teacher has its own columns, which are not augmented, or `student_only` changes
            words and rows are tokens.

    >>> from hf_distill.augment import Augmentation
    >>> louder = Augmentation(lambda example: {"gain": 2 * example["gain"]}, moves_positions=False)
    >>> AugmentingCollator(lambda examples: examples[0], louder)([{"gain": 1.0}])
    {'gain': 2.0}
    """

    view_column = "view_number"  # the column of an example that fixes its version

    def __init__(
        self,
        collator: Collator,
        *augmentations: AnyAugmentation,
        student_only: bool = False,
        seed: int = 0,
        views: int | None = None,
    ) -> None:
        if not callable(collator) or not augmentations:
            raise SettingError(
                "AugmentingCollator takes a collator, and then at least one augmentation: "
                f"got {type(collator).__name__} and {len(augmentations)} augmentations."
            )
        self.collator = collator
        self.augmentations = [checked(augmentation) for augmentation in augmentations]
        self.student_only = student_only
        self.seed = seed
        self.views = views
        self._check_views()
        # In shared memory, so that persistent worker processes see it change.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        moving = [name_of(augmentation) for augmentation in augmentations if augmentation.moves_positions]
        if student_only and moving:
            raise SettingError(
                f"student_only=True, and {', '.join(moving)} moves positions, so that the models would read different "
                "tokens or frames. Leave student_only out, or leave out such augmentations (WordReplacement: "
                "same_length=True)."
            )

    def __repr__(self) -> str:
        inner = ", ".join([type(self.collator).__name__, *map(repr, self.augmentations)])
        return f"AugmentingCollator({inner}, student_only={self.student_only}, seed={self.seed}, views={self.views})"

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute (such as `tokenizer`) of the wrapped collator."""
        if name == "collator":  # not set yet while unpickling
            raise AttributeError(name)
        return getattr(self.collator, name)

    @property
    def sentence_rows_only(self) -> bool:
        """Whether rows must be whole examples, because the two models may read different words."""
        return self.student_only and any(getattr(each, "changes_tokens", False) for each in self.augmentations)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch before its first batch is collated, as `DistillationTrainer` does.

        In a loop without this call, epochs differ only if their batches do, as with shuffled data.
        """
        self._epoch[0] = epoch

    def for_evaluation(self) -> Collator:
        """Return the wrapped collator, since evaluation data is not augmented."""
        clean = getattr(self.collator, "for_evaluation", None)
        return self.collator if clean is None else clean()

    def __call__(self, features: Sequence[Example]) -> Batch:
        examples = [_as_dict(feature) for feature in features]
        if not self.student_only:
            self._check_no_teacher_columns(examples)
        numbers = [example.pop(self.view_column, None) for example in examples]
        key = (self.seed, int(self._epoch), examples)
        if self.views is None:
            with seeded("examples", *key):
                augmented = before_collation(self.augmentations, [dict(example) for example in examples])
        else:
            turn = int(self._epoch) % self.views
            augmented = [
                self._version(example, turn if number is None else number)
                for example, number in zip(examples, numbers, strict=True)
            ]
        clean: dict[str, Any] = {}
        if self.student_only:
            with generators_kept():  # so that a random collator (masked LM) draws the same numbers for both
                clean = dict(self.collator(examples))
            token_labels = "start_positions" in clean or _has_token_labels(examples, clean)
            if self.sentence_rows_only and token_labels:
                raise DataError(OTHER_TOKENS)
        batch = self.collator(augmented)
        with seeded("batch", *key):
            batch = after_collation(self.augmentations, batch)
        if not any(name.startswith(TEACHER_PREFIX) for name in batch):  # then its inputs are clean already
            batch.update({f"{TEACHER_PREFIX}{name}": value for name, value in clean.items() if name not in LABELS})
        return batch

    def _version(self, example: Example, number: int) -> Example:
        """Return a fixed version of an example, which depends on its inputs only, not on labels and other columns."""
        inputs = {name: example[name] for name in INPUTS if name in example}
        with seeded("view", self.seed, int(number), inputs or example):
            return before_collation(self.augmentations, [dict(example)])[0]

    def _check_views(self) -> None:
        if self.views is None:
            return
        check_whole_number("views", self.views)
        of_batches = [name_of(each) for each in self.augmentations if each.acts_on == "batch"]
        if of_batches:
            raise SettingError(
                f"views={self.views}, and {', '.join(of_batches)} acts on collated batches, which differ in every "
                "epoch. Use augmentations of examples, or leave views out."
            )

    def _check_no_teacher_columns(self, examples: Sequence[Example]) -> None:
        own = sorted({name for example in examples for name in example if name.startswith(TEACHER_PREFIX)})
        if own:
            raise DataError(
                f"the teacher has columns of its own ({', '.join(own)}), which are not augmented, so that the models "
                "would read different examples. Pass student_only=True to allow that, or leave those columns out."
            )


def _has_token_labels(examples: Sequence[Example], batch: Batch) -> bool:
    """Return whether a batch has a label for each token, not counting those of a sequence-to-sequence model."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None:
        return False
    if not any(name in examples[0] for name in LABELS):  # the collator made them from the tokens
        return tuple(labels.shape) == tuple(ids.shape)
    sizes = {(np.shape(example["input_ids"]), np.shape(example.get("labels", 0))) for example in examples}
    return len(sizes) > 1 and all(inputs == labelled for inputs, labelled in sizes)


def _as_dict(feature: Example) -> dict[str, Any]:
    if not isinstance(feature, Mapping):
        raise DataError(
            f"AugmentingCollator takes examples that are mappings of columns, not a {type(feature).__name__}. Use a "
            "dataset of dicts."
        )
    return dict(feature)
