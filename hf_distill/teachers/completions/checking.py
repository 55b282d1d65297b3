"""All prompts, read once before anything is written: which of them cannot be asked, and what each shard asks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import gather_object

from hf_distill.errors import DataError
from hf_distill.teachers.completions.prompts import Prompts
from hf_distill.teachers.completions.shards import digest_of

_SHOWN = 4  # of the rows that cannot be asked; the others are counted


def digests_of(prompts: Prompts, shards: Iterable[range], *, batch_size: int, processes: int = 1) -> list[str]:
    """Of what each of these shards asks. Each process reads its own, and all of them refuse alike.

    Raises:
        SettingError: the prompts cannot be read with this tokenizer.
        DataError: rows that cannot be asked, by column and index.
    """
    digests, wrong = [], []
    usual = None
    for indices in shards:
        asked: list[Any] = []
        for index in indices:
            try:
                asked.append(prompts[index])
            except DataError as error:
                wrong.append((index, str(error)))
                continue
            if batch_size > 1 and isinstance(asked[-1], torch.Tensor):
                usual = asked[-1] if usual is None else usual
                reason = prompts.other_shape(asked[-1], usual) if asked[-1].shape != usual.shape else None
                if reason is not None:
                    wrong.append((index, f"{prompts.column}[{index}]: {reason}"))
        digests.append(digest_of(asked))
    _refuse(sorted(wrong if processes == 1 else gather_object(wrong)), len(prompts))
    return digests


def _refuse(wrong: list[tuple[int, str]], count: int) -> None:
    if not wrong:
        return
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    raise DataError(
        f"{len(wrong)} of {count} prompts cannot be asked. {'; '.join(told for _, told in wrong[:_SHOWN])}{more}. Mend "
        "such rows, or leave them out (dataset.filter)."
    )
