"""PackingCheck: tests before the first step whether a model separates sequences that are packed into one row.

transformers separates packed sequences by their `position_ids` if a model builds its mask from them. Some models do not
(OPT, BLOOM), recurrent ones (Mamba) have no mask, an explicit attention mask replaces it, and flash attention handles
only batches of one row: each sequence then silently sees those before it. Masks of four axes define everything
themselves and are not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_distill._types import Keywords
from hf_distill.ddp import several_processes
from hf_distill.errors import DataError
from hf_distill.models.generation import evaluating
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.infer import forward_names, unwrapped

_LENGTHS = (2, 3)  # of the two sequences of the trial
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
_SEPARATORS = (*_BOUNDARIES, "seq_idx")  # what may separate sequences besides position_ids
PACKING_COLUMNS = ("position_ids", *_SEPARATORS)  # a batch without any of these is not packed
_LONGEST = ("max_length_q", "max_length_k")
_WITHOUT_MASK = (
    "The attention_mask is why: without one they are kept apart. Drop attention_mask from the batch. (Collators that "
    "pad, such as DataCollatorForSeq2Seq, add one: use default_data_collator, or DataCollatorWithFlattening.)"
)
_ONE_ROW = (
    "In a batch of one row, without attention_mask, they are kept apart (by flash attention only there). Use "
    "DataCollatorWithFlattening, or one row a batch."
)
_NUMBERED = (
    "The batch has no position_ids, and this model or its attention does not read what else separates them. Leave "
    "return_position_ids=True in DataCollatorWithFlattening, or use a collator that pads."
)
_PADDED = (
    "Use a collator that pads (DataCollatorWithPadding, DataCollatorForSeq2Seq); or a model whose attention follows "
    "position_ids (Llama, Mistral, Qwen, Gemma, GPT-2, GPT-NeoX among others)."
)


class _Teacher(Protocol):
    """The part of a `Teacher` that is needed here."""

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals: ...

    def models(self) -> list[nn.Module]: ...


def _class_name(model: Any) -> str:
    return type(unwrapped(model)).__name__


class _Layout(NamedTuple):
    """The features of packing that decide whether a model separates sequences.

    Attributes:
        several_rows: whether the batch has several rows.
        masked: whether there is an attention mask `[b t]`.
        padded: whether the mask hides positions.
        numbered: whether the mask numbers the sequences from 1.
    """

    several_rows: bool = False
    masked: bool = False
    padded: bool = False
    numbered: bool = False


class PackingCheck:
    """Tests student and teacher once, at the first batch that may be packed; later batches are checked only if needed.

    Args:
        student: the model without wrappers.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self._several_rows = False
        self._tried: dict[tuple[str, _Layout], str] = {}  # the description of a model that leaks, otherwise ""

    def __call__(self, batches: Sequence[Batch], task: Task, teacher: _Teacher | None, needs: Needs) -> None:
        """Raise if sequences are packed and one of the models does not separate them.

        Args:
            batches: the batches of an optimizer step.
            task: reads the teacher's predictions.
            teacher: the teacher, or None.
            needs: what the teacher must compute.

        Raises:
            DataError: if the outputs for a packed sequence depend on another one.
        """
        batches = [batch for batch in batches if batch.get("input_ids") is not None]
        free = [batch for batch in batches if may_be_packed(batch) or _has_boundaries(batch)]
        masked = [batch for batch in batches if _has_a_mask(batch)]
        problem = ""
        if free:
            # What holds for several rows holds for one, so all processes run the trial at the same step.
            self._several_rows = self._several_rows or any(len(batch["input_ids"]) > 1 for batch in free)
            why = self._refusal(_Layout(self._several_rows), free[0], task, teacher, needs)
            problem = why if any(map(_holds_several, free)) else ""
        if masked and not problem:
            is_packed, *how = self._agreed(torch.stack([_found(batch) for batch in masked]).amax(0), teacher).tolist()
            if is_packed:
                problem = self._refusal(_Layout(*map(bool, how)), masked[0], task, teacher, needs)
        if problem:
            raise DataError(problem)

    def _refusal(self, layout: _Layout, batch: Batch, task: Task, teacher: _Teacher | None, needs: Needs) -> str:
        """Return why sequences in this layout are not allowed and what to do; empty if they are."""

        def leaking(layout: _Layout) -> str:
            return self._leaking(layout, batch, task, teacher, needs)

        if not leaking(layout):
            return ""
        way_out = _PADDED if batch.get("position_ids") is not None else _NUMBERED
        if layout.masked and not leaking(_Layout(layout.several_rows)):
            way_out = _WITHOUT_MASK
        elif layout.several_rows and not leaking(_Layout()):
            way_out = _ONE_ROW
        return (
            f"several sequences are packed into a row, and the {leaking(layout)} lets each see those before it: its "
            f"outputs for a sequence change with the previous one. {way_out}"
        )

    def _leaking(self, layout: _Layout, batch: Batch, task: Task, teacher: _Teacher | None, needs: Needs) -> str:
        """Return the names of the models that leak; each is tested once, when first needed."""
        device = next(self.student.parameters()).device
        uncached = {"use_cache": False} if "use_cache" in forward_names(self.student) else {}

        def run_student(tried: Batch) -> Batch:
            with torch.no_grad(), evaluating(self.student):
                outputs: Batch = self.student(**tried, **uncached)
            return outputs

        def run_teacher(tried: Batch) -> Batch:
            assert teacher is not None
            signals = teacher(task, tried, needs)
            return {"logits": signals.logits, **{str(key): value for key, value in signals.activations.items()}}

        trials: list[tuple[str, str, Callable[[Batch], Batch]]] = [("student", _class_name(self.student), run_student)]
        if teacher is not None and (needs.logits or needs.activations) and teacher.models():
            trials.append(("teacher", _class_name(getattr(teacher, "model", teacher)), run_teacher))
        for whose, name, run in trials:
            if (whose, layout) not in self._tried:
                leaks = _leaks(run, batch, layout, device)
                self._tried[whose, layout] = f"{whose} ({name})" if leaks else ""
        return " and the ".join(filter(None, (self._tried[whose, layout] for whose, *_ in trials)))

    def _agreed(self, found: Tensor, teacher: _Teacher | None) -> Tensor:
        """Return the findings of all processes combined, since all must run a model if one does."""
        models = [self.student, *([] if teacher is None else teacher.models())]
        if several_processes() and any(map(is_sharded, models)):
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found


def packs_several(batch: Batch) -> bool:
    """Return whether a row holds several sequences, judged from a batch without a mask."""
    return (may_be_packed(batch) or _has_boundaries(batch)) and _holds_several(batch)


def may_be_packed(batch: Batch) -> bool:
    """Return whether rows may hold several sequences: positions are numbered, and no mask excludes it."""
    ids = batch.get("position_ids")
    return isinstance(ids, Tensor) and ids.dim() == 2 and batch.get("attention_mask") is None


def _has_boundaries(batch: Batch) -> bool:
    """Return whether the batch has boundaries of sequences (for flash attention or recurrent models), and no mask."""
    return batch.get("attention_mask") is None and any(batch.get(name) is not None for name in _SEPARATORS)


def _holds_several(batch: Batch) -> bool:
    """Return whether a row of a batch without a mask holds several sequences."""
    if may_be_packed(batch):
        return bool((batch["position_ids"].diff(dim=-1) != 1).any())
    ends = next((batch[name] for name in _BOUNDARIES if batch.get(name) is not None), None)
    return bool(batch["seq_idx"].diff(dim=-1).any()) if ends is None else ends.numel() > len(batch["input_ids"]) + 1


def _has_a_mask(batch: Batch) -> bool:
    """Return whether positions are numbered and there is a mask without pairs of positions."""
    ids, mask = batch.get("position_ids"), batch.get("attention_mask")
    if not (isinstance(ids, Tensor) and isinstance(mask, Tensor) and ids.dim() == mask.dim() == 2):
        return False
    return ids.shape[1] == mask.shape[1] and len(ids) in (1, len(mask))


def _found(batch: Batch) -> Tensor:
    """Return `[4]` int: whether a row is packed, and the fields of `_Layout` except `masked`."""
    mask = batch["attention_mask"]
    several = torch.tensor(len(batch["input_ids"]) > 1, device=mask.device)
    how = torch.stack((several, torch.ones_like(several), (mask == 0).any(), (mask > 1).any()))
    packed = _restarts(batch["position_ids"].expand_as(mask), mask != 0)
    return torch.cat((packed[None], how & packed)).int()


def _restarts(positions: Tensor, attended: Tensor) -> Tensor:
    """Return whether the position numbers `[b t]` decrease somewhere, or start twice, a scalar bool."""
    order = (~attended).int().argsort(dim=-1, stable=True)  # attended positions first, in their order
    numbers = positions.gather(1, order)
    before, now = numbers[:, :-1], numbers[:, 1:]
    again = (now < before) | ((now == before) & (now == numbers[:, :1]))
    follows = torch.arange(1, numbers.shape[1], device=numbers.device) < attended.sum(-1, keepdim=True)
    return (again & follows).any()


def is_sharded(model: nn.Module) -> bool:
    """Return whether weights are sharded (FSDP2, tensor parallelism, ZeRO-3): then all processes must run a forward."""
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())


def _leaks(run: Callable[[Batch], Batch], batch: Batch, layout: _Layout, device: torch.device) -> bool:
    """Return whether changing the first of two sequences changes the outputs for the second."""
    answers = []
    for tokens in ((1, 2), (2, 3)):
        tried = _two_sequences(batch, tokens, layout, device)
        answers.append(list(_of_second(run(tried), width=tried["input_ids"].shape[1])))
    return any(bool((x - other).abs().max() > 1e-5 * x.abs().max()) for x, other in zip(*answers, strict=True))


def _two_sequences(batch: Batch, first: tuple[int, int], layout: _Layout, device: torch.device) -> Keywords:
    """Return a row of two sequences, separated in the same way as in this batch."""
    lengths = (*_LENGTHS, 1) if layout.padded else _LENGTHS
    rows = 2 if layout.several_rows else 1
    ids, mask = batch.get("position_ids"), batch.get("attention_mask")

    def filled(values: list[int], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor([values] * rows, dtype=dtype, device=device)

    def numbered(*numbers: int) -> list[int]:
        return [number for number, length in zip(numbers, lengths, strict=False) for _ in range(length)]

    made: Keywords = {"input_ids": filled([*first, 3, 1, 2, 0][: sum(lengths)])}
    if ids is not None:
        start = int((ids if mask is None else ids.expand_as(mask)[mask != 0]).min())
        made["position_ids"] = filled([start + i for length in lengths for i in range(length)])
    if layout.masked and mask is not None:
        made["attention_mask"] = filled(numbered(1, 2 if layout.numbered else 1, 0), mask.dtype)
    if batch.get("seq_idx") is not None:
        made["seq_idx"] = filled(numbered(0, 1, 2), batch["seq_idx"].dtype)
    ends = torch.tensor((0, *lengths * rows), device=device).cumsum(0)
    made |= {name: ends.to(batch[name].dtype) for name in _BOUNDARIES if batch.get(name) is not None}
    return made | {name: max(lengths) for name in _LONGEST if batch.get(name) is not None}


def _of_second(outputs: Batch, *, width: int) -> Iterator[Tensor]:
    """Return a model's outputs `[b t *]` at the positions of the second sequence."""
    for name in outputs:
        value = outputs[name]
        if name != "loss" and isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == width:
            yield value[:, _LENGTHS[0] : sum(_LENGTHS)].float()
