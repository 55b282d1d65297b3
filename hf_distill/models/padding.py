"""PaddingCheck: tests once, with the first batches, whether a model reads padding.

Three kinds of models do, in `Trainer` as well. The classification heads of decoders find the last token by
`config.pad_token_id`, which may differ from the token that pads the batch. Models with absolute positions count them
from left padding on. And some (XLNet) take the last position of a right-padded batch for the last token. The first is
corrected if the tokenizer is known, as `Trainer` does when training starts; otherwise a warning is logged, and the
student trains as it would in `Trainer`.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_distill.models.generation import evaluating
from hf_distill.tasks import Batch
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.tasks.infer import config_of, forward_names, unwrapped

logger = logging.getLogger(__name__)
_FINDS_LAST_TOKEN = re.compile(r"input_ids\s*!=\s*self\.config\S*\.pad_token_id")
_TRIED_WITH = {"input_ids", "attention_mask", "token_type_ids"}  # models with other inputs are not tested
_LONGEST, _PADDING = 8, 4  # tokens of the trial
_EXACT, _ROUNDED = (
    0.01,
    0.3,
)  # of the predictions' standard deviation; positions that are off by some make 0.08 and more
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
_BY_SIDE = {
    "left": "positions are counted from the padding on, or the padding is read. Pad on the right "
    '(tokenizer.padding_side = "right"), or let the collator add position_ids = (attention_mask.cumsum(-1) - 1)'
    ".clamp(min=0), which both models then read",
    "right": 'its last position is taken for the last token. Pad on the left (tokenizer.padding_side = "left")',
}


class PaddingCheck:
    """Tests student and teacher with the first batches.

    Args:
        student: the model, without what wraps it.
        tokenizer: the student's tokenizer, or None if it is not known.
    """

    def __init__(self, student: Any, tokenizer: Any) -> None:
        self._student = student
        self._tokenizer = tokenizer
        self.done = False

    def __call__(self, batches: Sequence[Batch], teacher: Any = None, accelerator: Any = None) -> None:
        """Test the models; calls after the first one do nothing, so that no later step waits for the device.

        Args:
            batches: those of an optimizer step, or one of an evaluation.
            teacher: a Teacher, tested if it is a single model; or None.
            accelerator: None means one process.
        """
        if self.done:
            return
        self.done = True
        if finds_last_token(self._student):
            self._align(batches)
        if getattr(accelerator, "distributed_type", None) in _SHARDED:
            return
        models = [("student", self._student, batches)]
        if isinstance(getattr(teacher, "model", None), nn.Module):
            models.append(("teacher", unwrapped(teacher.model), [_read_by_teacher(batch) for batch in batches]))
        for side, cause_and_cure in _BY_SIDE.items():
            found = [
                f"the {whose} ({type(model).__name__})"
                for whose, model, read in models
                if (side == "left" or _takes_last_position(model)) and _reads_padding(model, read, side)
            ]
            if found:
                logger.warning(
                    f"The batches are padded on the {side} and have no position_ids, and the outputs of "
                    f"{' and '.join(found)} for a text change with its padding, in Trainer too: {cause_and_cure}."
                )

    def _align(self, batches: Sequence[Batch]) -> None:
        """Set the student's padding token, if its head finds the last token by it."""
        config = self._student.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        before, known = config.pad_token_id, getattr(self._tokenizer, "pad_token_id", None)
        name = type(self._student).__name__
        if known is not None:
            if known != before:
                config.pad_token_id = known
                logger.warning(
                    f"The student's config.pad_token_id was {before}, and its tokenizer pads with {known}. It is set "
                    f"to {known}, as Trainer does when training starts: a {name} finds the last token of a text by it."
                )
            return
        found = None if before is None else _padded_with(batches, before)
        if found is not None:
            logger.warning(
                f"The student's config.pad_token_id is {before}, and the batch is padded with {found}. A {name} finds "
                "the last token of a text by that entry, so it reads its prediction at a padded position. Pass "
                f"processing_class= (the student's tokenizer), or set student.config.pad_token_id = {found}."
            )


@torch.no_grad()
def _reads_padding(model: Any, batches: Sequence[Batch], side: str) -> bool:
    """Return whether padding beside a few tokens of these batches, on one side, changes a model's outputs for them."""
    batch = next((one for one in batches if _can_be_tried(model, one, side)), None)
    if batch is None:
        return False
    weight = next(model.parameters())
    ids, mask = (batch[name].to(weight.device) for name in ("input_ids", "attention_mask"))
    padded = ((mask[:, 0 if side == "left" else -1] == 0) & (mask != 0).any(-1)).nonzero()
    if isinstance(weight, DTensor) or not len(padded):
        return False
    row = int(padded[0])
    attended = (mask[row] != 0).nonzero().flatten()
    real = ids[row][attended][:_LONGEST][None]
    beside = ids[row][: int(attended[0])] if side == "left" else ids[row][int(attended[-1]) + 1 :]
    padding = beside[:_PADDING][None]
    decodes = "decoder_input_ids" in forward_names(model)
    answers = []
    with evaluating(model):
        for added in (padding[:, :0], padding):
            parts = (added, real) if side == "left" else (real, added)
            inputs = torch.cat(parts, 1)
            attention = torch.cat([torch.full_like(part, part is real) for part in parts], 1).to(mask.dtype)
            decoded = {"decoder_input_ids": real[:, :1]} if decodes else {}
            outputs = model(input_ids=inputs, attention_mask=attention, **decoded)
            start = added.shape[1] if side == "left" else 0
            answers.append(_predictions(outputs, inputs.shape[1], slice(start, start + real.shape[1])))
    alone, with_padding = answers
    if alone is None or with_padding is None or alone.shape != with_padding.shape:
        return False
    allowed = _EXACT if weight.dtype in (torch.float32, torch.float64) else _ROUNDED
    spread = alone.std() if alone.numel() > 1 else alone.abs()
    return bool((alone - with_padding).abs().max() > allowed * spread.clamp(min=1e-6))


def _can_be_tried(model: Any, batch: Batch, side: str) -> bool:
    names = set(forward_names(model))
    read = {name for name, value in batch.items() if name in names and isinstance(value, Tensor)}
    others = {name for name in read if not name.startswith(("decoder_", "labels")) and not name.endswith("positions")}
    return {"input_ids", "attention_mask"} <= others <= _TRIED_WITH and _is_padded(batch, side)


def _read_by_teacher(batch: Batch) -> Batch:
    """Return the teacher's columns, if the batch has them."""
    own = {name.removeprefix(TEACHER_PREFIX): batch[name] for name in batch if name.startswith(TEACHER_PREFIX)}
    return own if "input_ids" in own else batch


def finds_last_token(model: Any) -> bool:
    """Return whether a head finds the last token of a text by the padding token of its config, as decoders' do."""
    try:
        return _FINDS_LAST_TOKEN.search(inspect.getsource(type(model).forward)) is not None
    except (OSError, TypeError):  # no source
        return False


def _takes_last_position(model: Any) -> bool:
    """Return whether a head may take the last position of a batch for the last token of each text, as XLNet's does."""
    return getattr(config_of(model), "summary_type", None) == "last"


def _padded_with(batches: Sequence[Batch], expected: int) -> int | None:
    """Return the id at padded positions if it is not the expected one, else None."""
    for batch in batches:
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if isinstance(ids, Tensor) and isinstance(mask, Tensor) and ids.shape == mask.shape:
            others = ids[(mask == 0) & (ids != expected)]
            if len(others):
                return int(others[0])
    return None


def _is_padded(batch: Batch, side: str) -> bool:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not (isinstance(ids, Tensor) and isinstance(mask, Tensor)) or ids.dim() != 2 or ids.shape != mask.shape:
        return False
    return batch.get("position_ids") is None and bool((mask[:, 0 if side == "left" else -1] == 0).any())


def _predictions(outputs: Any, width: int, real: slice) -> Tensor | None:
    """Return the first output that is not a loss; of one with an entry for each position, the real ones."""
    for name, value in outputs.items() if isinstance(outputs, Mapping) else ():
        if name != "loss" and isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            return (value[:, real] if value.shape[1] == width else value).float()
    return None
