"""Which of the teacher's own tokens are answers: `teacher_labels`, from where a prompt ends, or padded as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_distill.errors import DataError
from hf_distill.tasks.base import IGNORED


def with_answers_marked(tokenizer: Any, texts: Sequence[str], prompts: Sequence[str]) -> dict[str, Tensor]:
    """The teacher's inputs, and its labels `[b t]`: -100 but for the tokens of a text that reach beyond its prompt.

    A token that the tokenizer adds behind the text (the end of it) belongs to the answer, one that it adds before does
    not.

    Args:
        tokenizer: a fast one, which knows where in a text its tokens are. prompts: what each text begins with.

    Raises:
        DataError: a text that does not begin with its prompt, or a tokenizer that does not know where its tokens are.
    """
    for text, prompt in zip(texts, prompts, strict=True):
        if not text.startswith(prompt):
            raise DataError(
                f"teacher_text begins with {text[:40]!r}, its teacher_prompt is {prompt[:40]!r}. Give in teacher_text "
                "the prompt and the answer, in teacher_prompt the prompt alone."
            )
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"teacher_prompt needs a fast tokenizer, and {type(tokenizer).__name__} is none. Give the dataset "
            "teacher_input_ids and teacher_labels."
        )
    made = dict(tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt", return_offsets_mapping=True))
    ends = made.pop("offset_mapping")[..., 1]  # 0 of what the tokenizer adds
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    answers = ((ends > lengths[:, None]).cumsum(-1) > 0) & made["attention_mask"].bool()
    return {**made, "labels": made["input_ids"].masked_fill(~answers, IGNORED)}


def padded_as(mask: Tensor, labels: Sequence[Sequence[int]]) -> Tensor:
    """Labels as long as the inputs of the same example, `[b t]`: -100 where the mask shows padding.

    Raises:
        DataError: a label too many or too few.

    >>> padded_as(torch.tensor([[1, 1], [0, 1]]), [[-100, 7], [8]]).tolist()
    [[-100, 7], [-100, 8]]
    """
    lengths, expected = [len(one) for one in labels], mask.sum(-1).tolist()
    if lengths != expected:
        raise DataError(f"teacher_labels have lengths {lengths}, teacher_input_ids {expected}. Give a label a token.")
    padded = torch.full(mask.shape, IGNORED)
    padded[mask.bool()] = torch.tensor([label for one in labels for label in one], dtype=torch.long)
    return padded
