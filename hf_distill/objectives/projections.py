"""Learned linear projections from the student's width to the teacher's. Trained with the student, no part of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_distill.errors import SettingError, did_you_mean

PROJECTIONS = ("auto", "linear", "shared", "none")


class Projections(nn.Module):
    """`[n d_student]` → `[n d_teacher]`, one matrix a key, or one for all; none where the widths agree.

    FitNets (Romero et al. 2015, section 2.2) regress with a layer of their own a pair; the code of
    TinyBERT (Jiao et al. 2020) shares one. No bias.

    Args:
        kind: "auto" (where widths differ, one a key), "linear" (always, one a key), "shared" (one for all keys, where
            widths differ), "none". seed: of the starting values; the random generators are left alone.

    Raises:
        SettingError: widths that differ with "none", or that no config tells.
    """

    def __init__(
        self, keys: list[str], student_width: int | None, teacher_width: int | None, *, kind: str, seed: int
    ) -> None:
        super().__init__()
        if kind not in PROJECTIONS:
            hint = did_you_mean(kind, PROJECTIONS)
            raise SettingError(f"projection={kind!r}: allowed are {', '.join(PROJECTIONS)}.{hint}")
        self._kind = kind
        differ = student_width != teacher_width
        if kind == "none" and differ:
            raise SettingError(
                f"the student's hidden states are {student_width} wide, the teacher's {teacher_width}, and "
                "projection='none'. Let it be 'auto' (a learned projection), or use RelationMatch, which needs none."
            )
        self.matrices = nn.ModuleDict()
        if kind != "linear" and not differ:
            return
        if student_width is None or teacher_width is None:
            raise SettingError(
                f"no config tells how wide the hidden states are (student: {student_width}, teacher: {teacher_width}), "
                "so no projection can be made. Set hidden_size in the config, or pass projection='none'."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for key in ["all"] if kind == "shared" else keys:
                self.matrices[key] = nn.Linear(student_width, teacher_width, bias=False)

    def forward(self, rows: Tensor, key: str) -> Tensor:
        if not len(self.matrices):
            return rows
        matrix = self.matrices["all" if self._kind == "shared" else key]
        assert isinstance(matrix, nn.Linear)
        return matrix(rows.to(matrix.weight.dtype))
