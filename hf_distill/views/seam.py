"""What an augmentation is: a callable, and what the collator must know of it. The augmentations are elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch

from hf_distill.errors import SettingError

ActsOn = Literal["example", "examples", "batch"]
ACTS_ON: tuple[str, ...] = get_args(ActsOn)
Example = dict[str, Any]


class Augmentation:
    """Any callable as an augmentation; it returns a new example and leaves the one it is given as it is.

    It may draw from the generators of torch (on the CPU), numpy and `random`: whoever applies it seeds them, and puts
    them back. An object that has the two attributes itself need not be wrapped.

    Args:
        function: an example to an example; with `acts_on` "examples" a list of them to a list (to batch a model's
            forward), with "batch" a collated batch to a batch.
        moves_positions: a token or a frame may stand elsewhere afterwards (speed, crop, time warp, inserted words).
            Then student and teacher must be shown the same.
        acts_on: "example", "examples" or "batch".
        changes_tokens: a token may be another word afterwards.

    Raises:
        SettingError: not callable, or an unknown `acts_on`.

    >>> louder = Augmentation(lambda example: {**example, "gain": 2 * example["gain"]}, moves_positions=False)
    >>> louder({"gain": 1.0})
    {'gain': 2.0}
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        moves_positions: bool,
        acts_on: ActsOn = "example",
        changes_tokens: bool = False,
    ) -> None:
        self.function = function
        self.moves_positions = moves_positions
        self.acts_on = acts_on
        self.changes_tokens = changes_tokens
        checked(self)
        if not callable(function):
            raise SettingError(f"Augmentation needs a callable, not a {type(function).__name__}.")

    def __call__(self, shown: Any) -> Any:
        return self.function(shown)


def checked(augmentation: Any) -> Any:
    """The augmentation, if it is one.

    Raises:
        SettingError: not callable, or an attribute is missing or has another value than is allowed.
    """
    name = name_of(augmentation)
    missing = [known for known in ("moves_positions", "acts_on") if not hasattr(augmentation, known)]
    if not callable(augmentation) or missing:
        lacks = " and ".join(missing) or "a way to call it"
        raise SettingError(
            f"{name} is no augmentation: it lacks {lacks}. Wrap a function: "
            "hf_distill.views.Augmentation(function, moves_positions=False)."
        )
    if augmentation.acts_on not in ACTS_ON:
        raise SettingError(f"{name}: acts_on={augmentation.acts_on!r}. It may be {', '.join(ACTS_ON)}.")
    return augmentation


def name_of(augmentation: Any) -> str:
    function = getattr(augmentation, "function", augmentation)
    return getattr(function, "__name__", type(function).__name__)


def before_collation(augmentations: list[Any], examples: list[Example]) -> list[Example]:
    """The examples after those augmentations that act on examples, in their order."""
    for augmentation in augmentations:
        if augmentation.acts_on == "example":
            examples = [augmentation(example) for example in examples]
        elif augmentation.acts_on == "examples":
            examples = augmentation(examples)
    return examples


def after_collation(augmentations: list[Any], batch: Any) -> Any:
    """The batch after those augmentations that act on a batch, in their order."""
    for augmentation in augmentations:
        if augmentation.acts_on == "batch":
            batch = augmentation(batch)
    return batch


def like(original: Any, changed: Any) -> Any:
    """New numbers as what the old ones were: a tensor, an array or a list, of the same type of number."""
    if isinstance(original, torch.Tensor):
        return torch.as_tensor(changed, dtype=original.dtype, device=original.device)
    if isinstance(original, np.ndarray):
        return np.asarray(changed, dtype=original.dtype)
    return changed.tolist() if isinstance(changed, (torch.Tensor, np.ndarray)) else list(changed)
