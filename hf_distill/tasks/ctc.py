"""CTC speech recognition: one row for each frame after the convolution stack, without padded frames."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import SettingError, TeacherError
from hf_distill.tasks.base import Batch, PositionTask, attended


class CTC(PositionTask):
    """Frames `[b f v]`; the student's own rule gives the number of real ones from that of samples or input frames.

    With `config.ctc_loss_reduction="sum"` the head's loss is a sum over utterances, so the divergence is a sum over
    frames: both terms have one scale, and alpha=0 equals `Trainer`.

    Args:
        frame_lengths: function from input lengths `[b]` to numbers of frames `[b]`.
        sums_over_examples: whether the head's loss is a sum.
        config: the student's config, for its blank (`pad_token_id`) and `ctc_zero_infinity`.
    """

    kind = "ctc"
    axis = "frames"
    auto_classes = ("AutoModelForCTC",)
    matched_by = "vocabulary"

    def __init__(
        self,
        frame_lengths: Callable[[Tensor], Tensor],
        *,
        sums_over_examples: bool = False,
        config: PreTrainedConfig | None = None,
    ) -> None:
        self._frame_lengths = frame_lengths
        self._config = config
        self.sums_over_examples = sums_over_examples

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> CTC:
        rule = getattr(model, "_get_feat_extract_output_lengths", None)
        rule = rule or getattr(model, "_get_subsampling_output_length", None)
        if rule is None:
            raise SettingError(
                f"{type(model).__name__} has no rule for the length of its output. Pass task=CTC(frame_lengths) with a "
                "function from input lengths to numbers of frames."
            )
        return cls(rule, sums_over_examples=model.config.ctc_loss_reduction == "sum", config=model.config)

    def keep(self, batch: Batch) -> Tensor:
        mask = self._mask(batch)
        frames = int(self._frame_lengths(torch.tensor(mask.shape[1])))
        positions = torch.arange(frames, device=mask.device)
        return (positions < self.frames(batch)[:, None]).flatten()

    def _mask(self, batch: Batch) -> Tensor:
        return attended(batch, "attention_mask", ("input_values", "input_features"))

    def frames(self, batch: Batch) -> Tensor:
        """Return the number of frames of each example `[b]`."""
        mask = self._mask(batch)
        return self._frame_lengths(mask.sum(-1)).to(mask.device)

    def frames_needed(self, batch: Batch) -> Tensor:
        """Return the fewest frames `[b]` that can spell the labels: one a label, and a blank between equal neighbours.

        >>> CTC(lambda samples: samples).frames_needed({"labels": torch.tensor([[4, 4, 5, -100], [4, 4, 4, 4]])})
        tensor([4, 7])
        """
        labels = batch["labels"]
        spelled = (labels >= 0) & (labels != getattr(self._config, "pad_token_id", -1))
        order = spelled.int().argsort(dim=-1, descending=True, stable=True)  # without gaps, in the same order
        letters, real = labels.gather(-1, order), spelled.gather(-1, order)
        repeats = (letters[:, 1:] == letters[:, :-1]) & real[:, 1:]
        return spelled.sum(-1) + repeats.sum(-1)

    def label_fault(self, batch: Batch) -> str | None:
        if getattr(self._config, "ctc_zero_infinity", False):  # torch sets their loss to 0
            return None
        frames, needed = self.frames(batch), self.frames_needed(batch)
        too_long = (needed > frames).nonzero().flatten().tolist()
        if not too_long:
            return None
        first, others = too_long[0], len(too_long) - 1
        return (
            f"the labels of example {first} need {int(needed[first])} frames (one a label, and a blank between equal "
            f"neighbours), and its input makes {int(frames[first])}"
            f"{f'; {others} more examples of the batch are like that' if others else ''}. CTC cannot spell them: "
            "the loss is infinite. Leave such examples out, or set student.config.ctc_zero_infinity=True, with which "
            "they count as 0 and are counted in the log (ctc_labels_too_long)"
        )

    def counted(self, batch: Batch) -> dict[str, Tensor]:
        """Return the number of examples whose labels need more frames than there are, and so have no loss."""
        return {"ctc_labels_too_long": (self.frames_needed(batch) > self.frames(batch)).sum()}

    def label_count(self, batch: Batch) -> Tensor:
        labels = batch["labels"]
        return torch.tensor(labels.shape[0], device=labels.device)

    def check_heads(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        blanks = [model.config.pad_token_id for model in (student, teacher)]
        if blanks[0] != blanks[1]:
            raise TeacherError(
                f"student and teacher have different CTC blanks: pad_token_id {blanks[0]} and {blanks[1]}. Use a "
                "teacher with the student's vocabulary."
            )
