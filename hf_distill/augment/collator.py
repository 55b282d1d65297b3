"""A collator that shows the models augmented examples, or the student alone. The augmentations have their own files."""

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
    """A collator around another one: the examples of each batch are augmented, for both models alike.

    With `student_only` the batch holds the clean example too, as `teacher_*` columns, which the teacher reads.

    What is drawn follows from the seed, the epoch and what is in the batch, and from nothing else: neither the worker
    or process that collates it, nor what was drawn before. So a resumed run is the uninterrupted one, and the
    generators of the training (dropout) are left alone. As dropout, it depends on how the data is cut into batches.

    With `views=4` each example has four fixed versions, shown in turn, an epoch each: what is drawn follows from the
    seed, the number of the version and the example alone. A teacher's cache that is built with such a collator knows
    them.

    Args:
        collator: makes a batch of examples that are mappings.
        augmentations: applied in this order; each as `Augmentation` describes.
        student_only: the teacher is shown the clean example.
        seed: another seed, other augmentations.
        views: so many versions of each example; None: new ones each time.

    Raises:
        SettingError: no augmentation, something that is none, or `student_only` with one that moves positions; `views`
            below 1, or with an augmentation of collated batches.
        DataError: (when called) a teacher with columns of its own, which are not augmented; or `student_only` with
            other words, and rows that are tokens.

    >>> from hf_distill.augment import Augmentation
    >>> louder = Augmentation(lambda example: {"gain": 2 * example["gain"]}, moves_positions=False)
    >>> AugmentingCollator(lambda examples: examples[0], louder)([{"gain": 1.0}])
    {'gain': 2.0}
    """

    view_column = "view_number"  # of an example that says by itself which version is meant

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
        # In shared memory: worker processes that live for several epochs see it change.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        moving = [name_of(augmentation) for augmentation in augmentations if augmentation.moves_positions]
        if student_only and moving:
            raise SettingError(
                f"student_only=True, and {', '.join(moving)} moves positions: the student's tokens or frames would not "
                "be those of the teacher. Leave student_only out, so that both models are shown the same; or leave out "
                "what moves positions (WordReplacement: same_length=True)."
            )

    def __getattr__(self, name: str) -> Any:
        """Whatever is asked of the wrapped collator (`tokenizer`, say) is asked of it still."""
        if name == "collator":  # not there yet: being unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    @property
    def sentence_rows_only(self) -> bool:
        """Whether this is right only where a row is a whole example: the two models may see other words."""
        return self.student_only and any(getattr(one, "changes_tokens", False) for one in self.augmentations)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, before its first batch is collated. `DistillationTrainer` does so.

        In a loop of your own: without it an epoch is augmented otherwise only where its batches are other ones, as
        those of shuffled data are.
        """
        self._epoch[0] = epoch

    def for_evaluation(self) -> Callable[..., Any]:
        """The wrapped collator: evaluation is on the data as it is."""
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
            with generators_kept():  # so that a collator that draws (masked LM) draws alike for both
                clean = dict(self.collator(examples))
            self._check_same_tokens(examples, clean)
        batch = self.collator(shown)
        with seeded("batch", *key):
            batch = after_collation(self.augmentations, batch)
        if not any(name.startswith(TEACHER_PREFIX) for name in batch):  # else it has inputs of its own, and clean ones
            batch.update({f"{TEACHER_PREFIX}{name}": value for name, value in clean.items() if name not in LABELS})
        return batch

    def _version(self, example: dict[str, Any], number: int) -> dict[str, Any]:
        """One of the fixed versions of an example; labels and what else stands beside its input do not matter."""
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
    """Whether there is a label a token, as far as a batch shows it: those of a sequence-to-sequence model are none."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None:
        return False
    if not any(name in examples[0] for name in LABELS):  # the collator made them of the tokens
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
