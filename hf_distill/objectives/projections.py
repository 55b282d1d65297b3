"""Learned linear projections from the student's width to the teacher's. Trained with the student, no part of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_distill.errors import SettingError, did_you_mean

PROJECTIONS = ("auto", "linear", "shared", "none")


class Projections(nn.Module):
    """`[n d_student]` → `[n d_teacher]`, one matrix a key, or one for all; none where the widths agree.

    FitNets (Romero et al. 2015, section 2.2) regress with a layer of their own a pair; the code of
    TinyBERT (Jiao et al. 2020) shares one. No bias.

    Args:
        widths: key → the student's and the teacher's width there; None where it is not known.
        kind: "auto" (where widths differ, one a key), "linear" (always, one a key), "shared" (one for all keys, where
            widths differ), "none".
        seed: of the starting values; the random generators are left alone.

    Raises:
        SettingError: widths that differ with "none", or from key to key with "shared", or that are not known.
    """

    def __init__(self, widths: Mapping[str, tuple[int | None, int | None]], *, kind: str, seed: int) -> None:
        super().__init__()
        if kind not in PROJECTIONS:
            hint = did_you_mean(kind, PROJECTIONS)
            raise SettingError(f"projection={kind!r}: allowed are {', '.join(PROJECTIONS)}.{hint}")
        self._kind = kind
        self.matrices = nn.ModuleDict()
        wanted = {key: pair for key, pair in widths.items() if kind == "linear" or pair[0] != pair[1]}
        for ours, theirs in wanted.values():
            _check_widths(ours, theirs, kind)
        if kind == "shared" and wanted:
            wanted = _one_for_all(widths)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for key, (ours, theirs) in wanted.items():
                assert ours is not None and theirs is not None  # checked above
                self.matrices[key] = nn.Linear(ours, theirs, bias=False)

    def forward(self, rows: Tensor, key: str) -> Tensor:
        name = "all" if self._kind == "shared" else key
        if name not in self.matrices:
            return rows
        matrix = self.matrices[name]
        assert isinstance(matrix, nn.Linear)
        return matrix(rows.to(matrix.weight.dtype))


def _check_widths(ours: int | None, theirs: int | None, kind: str) -> None:
    if kind == "none":
        raise SettingError(
            f"the student's hidden states are {ours} wide, the teacher's {theirs}, and projection='none'. Let it be "
            "'auto' (a learned projection), or use RelationMatch, which needs none."
        )
    if ours is None or theirs is None:
        raise SettingError(
            f"no config tells how wide the hidden states are (student: {ours}, teacher: {theirs}), so no projection "
            "can be made. Set hidden_size in the config, or pass projection='none'."
        )


def _one_for_all(widths: Mapping[str, tuple[int | None, int | None]]) -> dict[str, tuple[int | None, int | None]]:
    """The one pair of widths, under the name of the matrix that all keys share."""
    pairs = sorted(set(widths.values()), key=str)
    if len(pairs) > 1:
        raise SettingError(
            "projection='shared' is one matrix for all pairs of blocks, and their widths differ: (student, teacher) "
            f"{', '.join(map(str, pairs))}. Let it be 'auto', one matrix a pair."
        )
    return {"all": pairs[0]}
