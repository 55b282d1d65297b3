"""Rows over a vocabulary, one for each position: masked, causal (labels shifted), and sequence to sequence."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill._types import Keywords
from hf_distill.errors import DataError
from hf_distill.tasks.base import IGNORED, Batch, PositionTask, attended, labels_of_rows

_SHOWN = 3  # examples named in the message about long texts


class MaskedLM(PositionTask):
    """Rows are the masked positions, whose label is not -100; without labels, all attended positions."""

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

    `shift_labels` of a collator (already shifted, padding-free batches) are used as they are, as in `Trainer`.
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
        """Return the positions where a real token predicts a token that counts.

        With left padding, the last padded position, which predicts the first token from nothing, is left out.
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
        assert labels is not None  # only called if there are labels
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
    """One row for each decoder position, not shifted.

    `prepare` makes the student's decoder inputs from the labels; a teacher model makes its own from the same labels,
    beginning with its own start token.
    """

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

    def prepare(self, batch: Keywords, student: PreTrainedModel) -> Keywords:
        if batch.get("decoder_input_ids") is None:
            if batch.get("labels") is None:
                raise DataError(_no_text(batch))
            batch = {**batch, "decoder_input_ids": decoder_inputs(batch["labels"], student)}
        _check_length(batch, student)
        return batch


def _no_text(batch: Batch) -> str:
    return (
        f"the batch has neither labels nor decoder_input_ids, only {sorted(batch)}, and a decoder is compared on given "
        "texts, also with alpha=1. Give transcripts or translations as labels, or let the teacher generate them: "
        "hf_distill.generate_completions(teacher, dataset, folder)."
    )


def _check_length(batch: Batch, student: PreTrainedModel) -> None:
    """Raise if a text is longer than the decoder's table of positions, and name the examples.

    Models without such a table (T5), or with one that grows (M2M100, Speech2Text), take texts of any length.
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


def decoder_inputs(labels: Tensor, model: nn.Module) -> Tensor:
    """Return decoder inputs `[b t]`: the labels shifted to the right, by the model's own rule if it has one.

    Raises:
        DataError: if the model has no rule, and its config no start token.
    """
    own_rule = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own_rule is not None:
        return own_rule(labels=labels.clone())  # FSMT writes into them
    # From the config itself, as in the models' own forwards, since `get_text_config` drops Whisper's start token.
    start, padding = (getattr(model.config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None or padding is None:
        raise DataError(
            f"{type(model).__name__}.config has no decoder_start_token_id or no pad_token_id, so decoder inputs "
            "cannot be made from the labels. Set them, or have the data collator give decoder_input_ids."
        )
    shifted = torch.roll(labels, 1, dims=-1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORED, padding)


def decoder_rule(model: nn.Module) -> list[int] | None:
    """Return the decoder inputs that a model makes from the labels 5, 6, 7, or None if it cannot make any."""
    try:
        return [int(token) for token in decoder_inputs(torch.tensor([[5, 6, 7]]), model)[0]]
    except (ValueError, TypeError, AttributeError):  # its config lacks a start or a padding token, or it has no decoder
        return None


class OwnDecoderInputs:
    """Decoder inputs for a teacher whose rule for making them from labels may differ from the student's.

    Args:
        student: the unwrapped student.
        teacher: the unwrapped teacher.

    Attributes:
        ours: the student's `decoder_rule`.
        theirs: the teacher's.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self._student, self._teacher = weakref.ref(student), weakref.ref(teacher)
        self.ours, self.theirs = decoder_rule(student), decoder_rule(teacher)

    def differ(self) -> bool:
        """Return whether both have a rule, and the rules differ."""
        return self.theirs is not None and self.ours is not None and self.ours != self.theirs

    def of(self, batch: Batch) -> Tensor:
        """Return the teacher's inputs `[b t]` for a batch with the student's `decoder_input_ids`.

        Rows that follow from the labels by the student's rule are made by the teacher's rule. Other rows, from a
        collator (such as Whisper's prompts), are shared as they are. Without labels, only the student's start token in
        first position is replaced by the teacher's.
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
