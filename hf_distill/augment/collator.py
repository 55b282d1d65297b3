"""AugmentingCollator: augmented examples for both models, or for the student only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_distill.augment.augmentation import after_collation, before_collation, checked, generators_kept, name_of, seeded
from hf_distill.errors import DataError, SettingError
from hf_distill.tasks.base import TEACHER_PREFIX

LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")
INPUTS = ("input_ids", "input_values", "input_features", "pixel_values", "inputs_embeds")
OTHER_TOKENS = (
    "student_only=True with an augmentation that may put another word at a token (WordReplacement), and rows that are "
    "tokens: the teacher's row would be about a word that the student is not shown. Leave student_only out: then both "
    "are shown the same words."
)


class AugmentingCollator:
    """Wraps a collator and augments the examples of each batch, in the same way for both models.

    With `student_only` the batch also holds the clean example as `teacher_*` columns, which the teacher reads.

    The random numbers follow from the seed, the epoch and the content of the batch only, not from the worker or process
    that collates it or from earlier batches. So a resumed run equals an uninterrupted one, and the generators of the
    training (dropout) are not used. Like dropout, it depends on how the data is cut into batches.

    With `views=4` each example has four fixed versions that alternate by epoch: the random numbers follow from the
    seed, the number of the version and the example only. A teacher's cache can be built over them with such a collator.

    Args:
        collator: makes a batch of examples that are mappings.
        augmentations: applied in this order; each as `Augmentation` describes.
        student_only: whether the teacher reads the clean example.
        seed: seed of the augmentations.
        views: number of fixed versions of each example; None means new ones each time.

    Raises:
        SettingError: if there is no augmentation, something is not one, `student_only` has one that moves positions, or
            `views` is below 1 or used with an augmentation of collated batches.
        DataError: when called, if the teacher has its own columns, which are not augmented, or `student_only` changes
            words and rows are tokens.

    >>> from hf_distill.augment import Augmentation
    >>> louder = Augmentation(lambda example: {"gain": 2 * example["gain"]}, moves_positions=False)
    >>> AugmentingCollator(lambda examples: examples[0], louder)([{"gain": 1.0}])
    {'gain': 2.0}
    """

    view_column = "view_number"  # in an example that names its version itself

    def __init__(
        self,
        collator: Callable[..., Any],
        *augmentations: Any,
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
                f"student_only=True, and {', '.join(moving)} moves positions: the student's tokens or frames would not "
                "be those of the teacher. Leave student_only out, so that both models are shown the same; or leave out "
                "what moves positions (WordReplacement: same_length=True)."
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
        """Whether it is valid only if a row is a whole example, because the two models may see different words."""
        return self.student_only and any(getattr(one, "changes_tokens", False) for one in self.augmentations)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch before its first batch is collated; `DistillationTrainer` does so.

        Without this call in a hand-written loop, epochs differ only if their batches do, as with shuffled data.
        """
        self._epoch[0] = epoch

    def for_evaluation(self) -> Callable[..., Any]:
        """Return the wrapped collator, since evaluation data is not augmented."""
        clean = getattr(self.collator, "for_evaluation", None)
        return self.collator if clean is None else clean()

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        examples = [_as_dict(feature) for feature in features]
        if not self.student_only:
            self._check_no_teacher_columns(examples)
        numbers = [example.pop(self.view_column, None) for example in examples]
        key = (self.seed, int(self._epoch), examples)
        if self.views is None:
            with seeded("examples", *key):
                shown = before_collation(self.augmentations, [dict(example) for example in examples])
        else:
            turn = int(self._epoch) % self.views
            shown = [self._version(one, turn if n is None else n) for one, n in zip(examples, numbers, strict=True)]
        clean: dict[str, Any] = {}
        if self.student_only:
            with generators_kept():  # so that a random collator (masked LM) draws the same for both
                clean = dict(self.collator(examples))
            self._check_same_tokens(examples, clean)
        batch = self.collator(shown)
        with seeded("batch", *key):
            batch = after_collation(self.augmentations, batch)
        if not any(name.startswith(TEACHER_PREFIX) for name in batch):  # else the teacher has its own, clean inputs
            batch.update({f"{TEACHER_PREFIX}{name}": value for name, value in clean.items() if name not in LABELS})
        return batch

    def _version(self, example: dict[str, Any], number: int) -> dict[str, Any]:
        """Return a fixed version of an example, which depends on its input only, not on labels and other columns."""
        inputs = {name: example[name] for name in INPUTS if name in example}
        with seeded("view", self.seed, int(number), inputs or example):
            (shown,) = before_collation(self.augmentations, [dict(example)])
        return shown

    def _check_views(self) -> None:
        if self.views is None:
            return
        if isinstance(self.views, bool) or not isinstance(self.views, int) or self.views < 1:
            raise SettingError(f"views={self.views!r}: must be a whole number of at least 1, or None.")
        of_batches = [name_of(one) for one in self.augmentations if one.acts_on == "batch"]
        if of_batches:
            raise SettingError(
                f"views={self.views}, and {', '.join(of_batches)} acts on collated batches, which are others in every "
                "epoch. Use augmentations of examples, or leave views out."
            )

    def _check_no_teacher_columns(self, examples: list[dict[str, Any]]) -> None:
        own = sorted({name for example in examples for name in example if name.startswith(TEACHER_PREFIX)})
        if own:
            raise DataError(
                f"the teacher has columns of its own ({', '.join(own)}), which are not augmented: it would be shown "
                "another example than the student. Pass student_only=True if that is meant, or leave those columns out."
            )

    def _check_same_tokens(self, examples: list[dict[str, Any]], clean: Mapping[str, Any]) -> None:
        if self.sentence_rows_only and ("start_positions" in clean or _has_labels_of_tokens(examples, clean)):
            raise DataError(OTHER_TOKENS)


def _has_labels_of_tokens(examples: list[dict[str, Any]], batch: Mapping[str, Any]) -> bool:
    """Return whether a batch has a label for each token (those of a sequence-to-sequence model do not count)."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None:
        return False
    if not any(name in examples[0] for name in LABELS):  # the collator made them from the tokens
        return tuple(labels.shape) == tuple(ids.shape)
    sizes = {(np.shape(example["input_ids"]), np.shape(example.get("labels", 0))) for example in examples}
    return len(sizes) > 1 and all(inputs == labelled for inputs, labelled in sizes)


def _as_dict(feature: Any) -> dict[str, Any]:
    if not isinstance(feature, Mapping):
        raise DataError(
            f"AugmentingCollator takes examples that are mappings of columns, not a {type(feature).__name__}. Let the "
            "dataset give dicts."
        )
    return dict(feature)
