"""Whether a model keeps sequences apart that are packed into one row: found by experiment, once, before the first step.

transformers separates packed sequences by their `position_ids` where a model's mask is made of them. Some models make
it without (OPT, BLOOM), and recurrent ones (Mamba) know no mask: each sequence then sees those before it, in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_distill.errors import DataError
from hf_distill.signals import Needs
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.generating import evaluating
from hf_distill.tasks.infer import forward_names, unwrapped

_LENGTHS = (2, 3)  # of the two sequences that are tried
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = ("max_length_q", "max_length_k")


class PackingCheck:
    """Tries student and teacher once, when the first batch comes that may be packed; then looks at batches if need be.

    Args:
        student: without what wraps it.
    """

    def __init__(self, student: Any) -> None:
        self._student = student
        self._tried: dict[str, str] = {}  # student and teacher → the one that leaks, in words; "": it does not

    def __call__(self, batches: Sequence[Batch], task: Task, teacher: Any, needs: Needs) -> None:
        """Refuse packed sequences, where one of the models does not keep them apart.

        Args:
            batches: of an optimizer step. teacher: a Teacher, None: there is none. needs: what it is asked for.

        Raises:
            DataError: what one of two packed sequences makes of its tokens changes with the other's.
        """
        if not may_be_packed(batches[0]) or batches[0].get("input_ids") is None:
            return
        self._try(batches[0], task, teacher, needs)
        leaking = " and the ".join(filter(None, self._tried.values()))
        if leaking and any(bool((batch["position_ids"].diff(dim=-1) != 1).any()) for batch in batches):
            raise DataError(
                f"several sequences are packed into a row, and the {leaking} lets each see those before it: what "
                "it makes of a sequence changes with the one packed before. Use a collator that pads "
                "(DataCollatorWithPadding, DataCollatorForSeq2Seq); or a model whose attention follows position_ids "
                "(Llama, Mistral, Qwen, Gemma, GPT-2, GPT-NeoX among others)."
            )

    def _try(self, batch: Batch, task: Task, teacher: Any, needs: Needs) -> None:
        """Each model once, the teacher when it is first asked."""
        asked = (needs.logits or needs.reads) and _is_of_models(teacher)
        if "student" in self._tried and ("teacher" in self._tried or not asked):
            return
        device = next(self._student.parameters()).device
        uncached = {"use_cache": False} if "use_cache" in forward_names(self._student) else {}

        def ask_student(tried: Batch) -> list[Tensor]:
            with torch.no_grad(), evaluating(self._student):
                return list(_of_positions(self._student(**tried, **uncached)))

        def ask_teacher(tried: Batch) -> list[Tensor]:
            shown = teacher(task, tried, needs)
            return list(_of_positions({"logits": shown.logits, **{str(k): v for k, v in shown.inside.items()}}))

        tried = [("student", self._student, ask_student)]
        if asked:
            tried.append(("teacher", getattr(teacher, "model", teacher), ask_teacher))
        for whose, model, ask in tried:
            leaks = whose not in self._tried and _leaks(ask, batch, device)
            self._tried[whose] = f"{whose} ({type(unwrapped(model)).__name__})" if leaks else self._tried.get(whose, "")


def _is_of_models(teacher: Any) -> bool:
    """Whether it runs models on any batch. (A cache knows no others than it saw; the student itself is tried.)"""
    members = getattr(teacher, "teachers", None)
    return all(map(_is_of_models, members)) if members else isinstance(getattr(teacher, "model", None), torch.nn.Module)


def may_be_packed(batch: Batch) -> bool:
    """Whether rows may hold several sequences: they are numbered, and no mask says otherwise."""
    ids = batch.get("position_ids")
    return isinstance(ids, Tensor) and ids.dim() == 2 and batch.get("attention_mask") is None


def _leaks(ask: Callable[[Batch], list[Tensor]], batch: Batch, device: torch.device) -> bool:
    """The first of two sequences is changed: does the second notice?"""
    first, second = (ask(_two_sequences(batch, tokens, device)) for tokens in ((1, 2), (2, 3)))
    return any(
        bool((one - other)[:, _LENGTHS[0] :].abs().max() > 1e-5 * one.abs().max())
        for one, other in zip(first, second, strict=True)
    )


def _two_sequences(batch: Batch, first: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """Two sequences in a row, told apart by whatever this batch tells them apart by."""
    start = int(batch["position_ids"].min())

    def row(values: list[int], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    positions = [start + i for length in _LENGTHS for i in range(length)]
    made: dict[str, Any] = {
        "input_ids": row([*first, 3, 1, 2])[None],
        "position_ids": row(positions)[None],
    }
    if batch.get("seq_idx") is not None:
        made["seq_idx"] = row([0] * _LENGTHS[0] + [1] * _LENGTHS[1], batch["seq_idx"].dtype)[None]
    for name in _BOUNDARIES:
        if batch.get(name) is not None:
            made[name] = row([0, _LENGTHS[0], sum(_LENGTHS)], batch[name].dtype)
    return made | {name: max(_LENGTHS) for name in _LONGEST if batch.get(name) is not None}


def _of_positions(outputs: Mapping[str, Any]) -> Iterator[Tensor]:
    """What a model says at each position `[1 t *]`."""
    for name in outputs:
        value = outputs[name]
        if name != "loss" and isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == sum(_LENGTHS):
            yield value.float()
