"""A collator that looks up what the teacher said, in the worker that makes the batch: training does not wait."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hf_distill.teachers.cached.cache import TeacherCache
from hf_distill.teachers.cached.drawn import refuse_drawn
from hf_distill.teachers.cached.versions import refuse_other_versions
from hf_distill.teachers.numbered import of_member


class CachedCollator:
    """The user's collator, with `teacher_cached_*` columns beside what it makes: aligned with the batch's padding.

    For evaluation it is the user's collator alone: evaluation does not ask the teacher, and its examples need not be
    in the cache.

    Args:
        collator: makes a batch of examples. cache: where to look. slot, fields: as `TeacherCache.look_up`.

    Raises:
        SettingError: a collator that draws masks or augmentations at run time, for both models, unless the cache was
            built of the same versions (`AugmentingCollator(views=...)`).
    """

    def __init__(
        self,
        collator: Callable[..., Any],
        cache: TeacherCache,
        *,
        slot: str = "",
        fields: Collection[str] | None = None,
    ) -> None:
        refuse_drawn(collator)
        refuse_other_versions(collator, cache.manifest)
        self.collator = collator
        self.cache = cache
        self.slot = slot
        self.fields = fields

    def __getattr__(self, name: str) -> Any:
        """Whatever is asked of the user's collator (`tokenizer`, say) is asked of it still."""
        if name in ("collator", "cache"):  # not there yet: being unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def for_evaluation(self) -> Callable[..., Any]:
        clean = getattr(self.collator, "for_evaluation", None)
        return self.collator if clean is None else clean()

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        batch = self.collator(features)
        if "decoder_input_ids" in self.cache.columns and "decoder_input_ids" not in batch:
            return batch  # the training makes them of the labels, and looks up then
        own = batch
        for number in filter(None, self.slot.split("_")):
            own = of_member(own, int(number))
        batch.update(self.cache.look_up(own, slot=self.slot, fields=self.fields))
        return batch

    def answers_as(self, other: CachedCollator) -> bool:
        """Whether it gives a batch what the other one does."""
        mine, theirs = self.fields, other.fields
        enough = mine is None or (theirs is not None and set(theirs) <= set(mine))
        return self.cache is other.cache and self.slot == other.slot and enough
