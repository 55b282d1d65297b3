"""Fixed versions of examples that a collator augments: a dataset of all of them, and whether a cache knows them.

The collator is not known here: it says `views` (how many), `seed` and `view_column` (which version an example is).
"""

from __future__ import annotations

from typing import Any

from hf_distill.errors import SettingError
from hf_distill.teachers.cached.fingerprints import differences


class Versions:
    """Each example as often as it has versions: all first ones in the dataset's order, then all second ones."""

    def __init__(self, dataset: Any, count: int, column: str) -> None:
        self.dataset = dataset
        self.count = count
        self.column = column

    def __len__(self) -> int:
        return self.count * len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, place = divmod(index, len(self.dataset))
        return {**self.dataset[place], self.column: number}


def with_versions(dataset: Any, collator: Any) -> Any:
    """The dataset, or all versions of it that the collator shows to the teacher."""
    if described(collator) is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return dataset
    return Versions(dataset, collator.views, collator.view_column)


def described(collator: Any) -> dict[str, Any] | None:
    """For the manifest; None: the teacher is shown the examples as they are."""
    views = getattr(collator, "views", None)
    if views is None or getattr(collator, "student_only", None) is not False:
        return None
    functions = [getattr(one, "function", one) for one in collator.augmentations]
    names = [getattr(one, "__name__", type(one).__name__) for one in functions]
    return {"views": views, "seed": collator.seed, "augmentations": names}


def refuse_other_versions(collator: Any, manifest: Any) -> None:
    """Raises:
    SettingError: the collator shows the teacher what the cache was not built of.
    """
    now, there = described(collator), manifest.get("views")
    if now is None:
        return
    if there is None:
        raise SettingError(
            f"the collator shows {now['views']} augmented versions of each example, and the cache was built of the "
            "examples as they are. Build it with this collator (data_collator=), or leave the augmentation out."
        )
    fewer = {**now, "views": there["views"]} if now["views"] <= there["views"] else now
    if fewer != there:
        raise SettingError(
            f"the cache was built of other versions of the examples: {'; '.join(differences(there, now))}. Train with "
            "the collator that it was built with, or build it with this one."
        )
