"""Rows over a vocabulary, a row a position: masked, causal (labels shifted), and sequence to sequence."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.errors import DataError
from hf_distill.tasks.base import IGNORED, Batch, PositionTask, attended, labels_of_rows

_SHOWN = 3  # of the texts that are too long; the others are counted


class MaskedLM(PositionTask):
    """The positions whose label is not -100, the masked ones; without labels, all that are attended."""

    kind = "masked_lm"
    axis = "input"
    auto_classes = ("AutoModelForMaskedLM",)
    padding_collator = "DataCollatorForTokenClassification(tokenizer)"
    matched_by = "vocabulary"
    over_vocabulary = True

    def keep(self, batch: Batch) -> Tensor:
        if batch.get("labels") is not None:
            return (batch["labels"] != IGNORED).flatten()
        return attended(batch, "attention_mask", ("input_ids", "inputs_embeds")).flatten()

    def targets(self, batch: Batch) -> Tensor | None:
        return labels_of_rows(batch)


class CausalLM(PositionTask):
    """Position i predicts token i + 1: logits lose their last position, labels their first.

    A collator that gives `shift_labels` (already shifted, padding-free batches) is taken at its word, as in `Trainer`.
    """

    kind = "causal_lm"
    axis = "input"
    generates = True
    auto_classes = ("AutoModelForCausalLM",)
    padding_collator = "DataCollatorForSeq2Seq(tokenizer)"
    matched_by = "vocabulary"
    over_vocabulary = True
    shifts_labels = True

    def select(self, x: Tensor, batch: Batch) -> Tensor:
        if batch.get("shift_labels") is not None:
            return x.flatten(0, 1)
        return x[:, :-1].flatten(0, 1)

    def keep(self, batch: Batch) -> Tensor:
        """Where a real token predicts one that counts: with left padding, the last padded position predicts the first
        token from nothing, and would be a row more for each shorter example.
        """
        labels, mask = self._next_tokens(batch), batch.get("attention_mask")
        if labels is None:
            mask = attended(batch, "attention_mask", ("input_ids", "inputs_embeds"))
            return (mask[:, :-1] & mask[:, 1:]).flatten()
        keep = labels != IGNORED
        if batch.get("shift_labels") is None and mask is not None and mask.dim() == 2:
            keep = keep & mask[:, :-1].bool()
        return keep.flatten()

    def label_count(self, batch: Batch) -> Tensor:
        labels = self._next_tokens(batch)
        assert labels is not None  # the labels term is only asked for where there are labels
        return (labels != IGNORED).sum()

    def targets(self, batch: Batch) -> Tensor | None:
        labels = self._next_tokens(batch)
        return None if labels is None else labels.flatten()

    def has_labels(self, batch: Batch) -> bool:
        return batch.get("shift_labels") is not None or batch.get("labels") is not None

    def _next_tokens(self, batch: Batch) -> Tensor | None:
        if batch.get("shift_labels") is not None:
            return batch["shift_labels"]
        return None if batch.get("labels") is None else batch["labels"][:, 1:]


class Seq2Seq(PositionTask):
    """A row a decoder position: not shifted. `prepare` makes the student's decoder inputs from the labels; a teacher
    that is a model makes its own from the same labels, beginning with its own start token."""

    kind = "seq2seq"
    axis = "decoder"
    generates = has_decoder = True
    auto_classes = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")
    padding_collator = "DataCollatorForSeq2Seq(tokenizer, model=model)"
    matched_by = "vocabulary"
    over_vocabulary = True

    def keep(self, batch: Batch) -> Tensor:
        if batch.get("labels") is not None:
            return (batch["labels"] != IGNORED).flatten()
        if batch.get("decoder_input_ids") is None:
            raise DataError(_no_text(batch))
        return attended(batch, "decoder_attention_mask", ("decoder_input_ids",)).flatten()

    def targets(self, batch: Batch) -> Tensor | None:
        return labels_of_rows(batch)

    def can_compare(self, batch: Batch) -> bool:
        return batch.get("labels") is not None or batch.get("decoder_input_ids") is not None

    def prepare(self, batch: dict[str, Any], student: Any) -> dict[str, Any]:
        if batch.get("decoder_input_ids") is None:
            if batch.get("labels") is None:
                raise DataError(_no_text(batch))
            batch = {**batch, "decoder_input_ids": decoder_inputs(batch["labels"], student)}
        _check_length(batch, student)
        return batch


def _no_text(batch: Batch) -> str:
    return (
        f"the batch has neither labels nor decoder_input_ids, only {sorted(batch)}, and a decoder is compared on the "
        "texts that it is shown, also with alpha=1. Give transcripts or translations as labels, or let the teacher "
        "write them: hf_distill.generate_completions(teacher, dataset, folder)."
    )


def _check_length(batch: Batch, student: Any) -> None:
    """Raise if a text is longer than the decoder's table of positions, naming the examples.

    Models whose positions have no table (T5), or one that grows (M2M100, Speech2Text), take texts of any length.
    """
    find = getattr(student, "get_decoder", None)
    table = None if find is None else getattr(find(), "embed_positions", None)
    if not isinstance(table, nn.Embedding):
        return
    known, width = table.num_embeddings - getattr(table, "offset", 0), batch["decoder_input_ids"].shape[1]
    if width <= known:
        return
    labels = batch.get("labels")
    counted = torch.ones_like(batch["decoder_input_ids"]) if labels is None else (labels != IGNORED).long()
    lengths = (counted * torch.arange(1, width + 1, device=counted.device)).amax(1).tolist()
    long = [f"example {row} of the batch has {length}" for row, length in enumerate(lengths) if length > known]
    raise DataError(
        f"the texts are padded to {width} tokens, and the decoder of {type(student).__name__} has {known} positions: "
        f"{', '.join(long[:_SHOWN]) or 'no text is longer, only the padding'}"
        f"{f', and {len(long) - _SHOWN} more are too long' if len(long) > _SHOWN else ''}. Cut them "
        f"(tokenizer(..., truncation=True, max_length={known})) or leave such examples out."
    )


def decoder_inputs(labels: Tensor, model: Any) -> Tensor:
    """`[b t]`: the labels one to the right, by the model's own rule where it has one.

    Raises:
        DataError: the model has no rule, and its config does not say which token comes first.
    """
    own_rule = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own_rule is not None:
        return own_rule(labels=labels.clone())  # FSMT writes into them
    # As the models' own forwards: the config itself. (Its `get_text_config` forgets Whisper's start token.)
    start, padding = (getattr(model.config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None or padding is None:
        raise DataError(
            f"{type(model).__name__}.config has no decoder_start_token_id or no pad_token_id, so decoder inputs "
            "cannot be made from the labels. Set them, or have the data collator give decoder_input_ids."
        )
    shifted = torch.roll(labels, 1, dims=-1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORED, padding)


def decoder_rule(model: Any) -> list[int] | None:
    """What a model makes of the labels 5, 6, 7; None where it cannot make decoder inputs of labels."""
    try:
        return [int(token) for token in decoder_inputs(torch.tensor([[5, 6, 7]]), model)[0]]
    except (ValueError, TypeError, AttributeError):  # its config lacks a start or a padding token, or it has no decoder
        return None


class OwnDecoderInputs:
    """The decoder inputs of a teacher that makes others of the same labels than the student does.

    Args:
        student, teacher: the models, unwrapped.

    Attributes:
        ours, theirs: the `decoder_rule` of each.
    """

    def __init__(self, student: Any, teacher: Any) -> None:
        self._student, self._teacher = weakref.ref(student), weakref.ref(teacher)
        self.ours, self.theirs = decoder_rule(student), decoder_rule(teacher)

    def differ(self) -> bool:
        """Whether the teacher has a rule, and not the student's."""
        return self.theirs is not None and self.ours is not None and self.ours != self.theirs

    def of(self, batch: Batch) -> Tensor:
        """`[b t]`, from a batch with the student's `decoder_input_ids`.

        Rows that the student's rule makes of the labels are made by the teacher's rule. Other rows, which a collator
        gave (Whisper's prompts, say), are shared as they are. Without labels, only a first token that is the student's
        start token becomes the teacher's.
        """
        ids, labels = batch["decoder_input_ids"], batch.get("labels")
        student, teacher = self._student(), self._teacher()
        if labels is not None and labels.shape == ids.shape and student is not None and teacher is not None:
            ours, theirs = decoder_inputs(labels, student), decoder_inputs(labels, teacher)
            made = ((ids == ours) | (labels == IGNORED)).all(-1, keepdim=True)
            return torch.where(made, theirs, ids)
        assert self.ours is not None and self.theirs is not None  # `differ` comes first
        if self.ours[1:] != self.theirs[1:]:
            return ids
        starts = torch.full_like(ids[:, :1], self.theirs[0])
        return torch.cat((torch.where(ids[:, :1] == self.ours[0], starts, ids[:, :1]), ids[:, 1:]), 1)
