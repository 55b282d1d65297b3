"""Collators that draw at run time, which no cache can follow: refused, with the way out."""

from __future__ import annotations

from typing import Any

from hf_distill.errors import SettingError

_DRAWN = (
    "{what} changes examples anew each time, and a cached teacher knows only examples that it was asked about. Change "
    "them once before training ({instead}) and build the cache of that, or use the live teacher."
)


def refuse_drawn(collator: Any) -> None:
    """Raises:
    SettingError: see `CachedCollator`.
    """
    if getattr(collator, "mlm", False):
        instead = "mask the dataset with dataset.map and give it labels"
        raise SettingError(_DRAWN.format(what=f"{type(collator).__name__}(mlm=True)", instead=instead))
    if getattr(collator, "student_only", None) is False and getattr(collator, "views", None) is None:
        raise SettingError(
            _DRAWN.format(what="An augmentation", instead="hf_distill.views.augment_dataset")
            + " Or fix how many versions an example has, AugmentingCollator(..., views=4), for the cache and the "
            "training alike; or with student_only=True show the teacher the clean example, which a cache knows."
        )
