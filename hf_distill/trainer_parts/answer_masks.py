"""A collator that turns the masks of chat templates and of TRL into labels, for causal language models.

`assistant_masks` and `completion_mask` hold a 1 for each token of an answer and a 0 for each other token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_distill.errors import DataError
from hf_distill.tasks.base import IGNORED

ANSWER_MASKS = ("assistant_masks", "completion_mask")


class AnswerMaskCollator:
    """The user's collator; labels are -100 wherever a mask of the examples is 0.

    Where the collator makes no labels they are made of `input_ids`. Examples without masks are left as they are.

    Args:
        collator: makes batches.
        reads_masks: whether the collator may read the masks itself. If it does and makes labels, they are kept.
    """

    def __init__(self, collator: Callable[..., Any], *, reads_masks: bool) -> None:
        self.collator = collator
        self._reads_masks = reads_masks

    def __getattr__(self, name: str) -> Any:
        """Every other attribute (`tokenizer`, say) is that of the user's collator."""
        if name == "collator":  # not there yet: being unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def for_evaluation(self) -> AnswerMaskCollator:
        """The same for evaluation, where the user's collator may have one without augmentation."""
        clean = getattr(self.collator, "for_evaluation", None)
        return self if clean is None else AnswerMaskCollator(clean(), reads_masks=self._reads_masks)

    def __call__(self, features: Sequence[Any]) -> Any:
        first = features[0] if isinstance(features[0], Mapping) else {}
        names = [name for name in ANSWER_MASKS if name in first]
        if not names or "input_ids" not in first:
            return self.collator(features)
        given = [dict(feature) for feature in features]
        if not self._reads_masks:
            given = [{k: v for k, v in feature.items() if k not in ANSWER_MASKS} for feature in given]
        batch = self.collator(given)
        has_labels = batch.get("labels") is not None or batch.get("shift_labels") is not None
        if not (self._reads_masks and has_labels):
            examples = [_mask_of(feature, names) for feature in features]
            _set_labels(batch, _aligned(batch["input_ids"], batch.get("attention_mask"), examples))
        for name in names:
            batch.pop(name, None)  # the model's forward does not take it
        return batch


def _mask_of(feature: Mapping[str, Any], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The ids `[t]` of an example, and whether each token is of an answer `[t]`: under every mask that it has."""
    ids = torch.as_tensor(feature["input_ids"])
    keep = torch.ones(ids.shape, dtype=torch.bool)
    for name in names:
        mask = feature.get(name)
        if mask is None or len(mask) != len(ids):
            found = "none" if mask is None else f"{len(mask)} entries"
            raise DataError(
                f"an example has {len(ids)} input_ids, and its {name} has {found}. Give each token of each example a 0 "
                "or a 1."
            )
        keep &= torch.as_tensor(mask).bool()
    return ids, keep


def _aligned(input_ids: Tensor, attention_mask: Any, examples: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`[b t]` bool: the masks of the examples where their tokens lie in the batch.

    Raises:
        DataError: the batch does not hold the examples' tokens, one example a row or all in one row.
    """
    if len(input_ids) == 1 and len(examples) > 1:  # without padding: one after the other
        ids, keep = (torch.cat(parts) for parts in zip(*examples, strict=True))
        examples = [(ids, keep)]
    if len(input_ids) == len(examples):
        rows = []
        for row, (ids, keep) in enumerate(examples):
            attended = attention_mask[row] if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
            rows.append(_placed(input_ids[row], attended, ids, keep))
        if all(row is not None for row in rows):
            return torch.stack([row for row in rows if row is not None])
    raise DataError(
        f"{' or '.join(ANSWER_MASKS)} says which tokens are of answers, and the collator's batch "
        f"{list(input_ids.shape)} does not hold the tokens of its {len(examples)} examples as they are, padded on one "
        "side. Make labels of the masks in the dataset (-100 where a mask is 0), and pad them too."
    )


def _placed(row: Tensor, attended: Tensor | None, ids: Tensor, keep: Tensor) -> Tensor | None:
    """`[t]`: an example's mask in its row, padded or truncated on either side; None: its tokens are not there."""
    length, width = len(ids), len(row)
    made = torch.zeros(width, dtype=torch.bool)
    if length >= width:
        for part in (slice(0, width), slice(length - width, length)):
            if torch.equal(ids[part], row):
                return keep[part]
        return None
    for start in (0, width - length):
        beside = torch.ones(width, dtype=torch.bool)
        beside[start : start + length] = False
        if torch.equal(row[start : start + length], ids) and (attended is None or not attended[beside].any()):
            made[start : start + length] = keep
            return made
    return None


def _set_labels(batch: Any, answers: Tensor) -> None:
    shifted = batch.get("shift_labels")
    if shifted is not None:  # the label of a token stands at the token before
        following = torch.cat((answers[:, 1:], torch.zeros_like(answers[:, :1])), 1)
        batch["shift_labels"] = shifted.masked_fill(~following, IGNORED)
    labels = batch.get("labels")
    if labels is not None or shifted is None:
        batch["labels"] = (batch["input_ids"] if labels is None else labels).masked_fill(~answers, IGNORED)
