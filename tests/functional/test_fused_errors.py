"""Inputs that the fused loss rejects, and the error messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_distill import SettingError
from hf_distill.errors import DataError
from hf_distill.functional.fused.inputs import Head, Labels, TeacherHidden, TeacherLogits, TeacherSparse, Terms
from hf_distill.functional.fused.loss import fused_linear_distillation

ROWS, HEAD = torch.zeros(3, 4), Head(torch.zeros(5, 4))
SAME = TeacherLogits(torch.zeros(3, 5))
KNOWN = torch.tensor([0, 1, 2])
SAMPLES = TeacherSparse(KNOWN[:, None], torch.zeros(3, 1), weights=torch.ones(3, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "forward"}, r"divergence='forward': allowed are forward_kl, reverse_kl"),
        (
            {"divergence": "dist"},
            r"divergence='dist' compares rows with each other, so it needs whole logits",
        ),
        ({"divergence": "jensen_shannon", "settings": {"beta": 2.0}}, r"beta=2.0: must lie in \[0, 1\]"),
        ({"settings": {"beta": 0.5}}, r"settings=\{'beta': 0.5\} of divergence='forward_kl': .*unexpected keyword"),
        ({"temperature": 0.0}, r"temperature=0.0: must lie in \(0, inf\)"),
        ({"temperature": float("nan")}, r"temperature=nan: must lie in \(0, inf\)"),
    ],
)
def test_invalid_terms_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Terms(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": torch.zeros(4)}, r"a head is a weight \[v d\] and a bias \[v\]; got \[5, 4\] and \[4\]"),
        ({"logit_scale": -1.0}, r"logit_scale=-1.0: must lie in \(0, inf\)"),
        ({"softcap": 0.0}, r"softcap=0.0: must lie in \(0, inf\)"),
    ],
)
def test_invalid_heads_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Head(torch.zeros(5, 4), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, r"neither labels nor a teacher"),
        ({"teacher": TeacherLogits(torch.zeros(3, 6))}, r"student and teacher have 5 and 6 columns. Pass columns="),
        ({"terms": Terms(columns=6)}, r"columns=6: must lie in \[1, 5\], the width of the narrower head"),
        ({"labels": Labels(KNOWN, smoothing=1.0)}, r"smoothing=1.0: must lie in \[0, 1\)"),
        (
            {"teacher": TeacherSparse(KNOWN[:, None], torch.zeros(3, 1)), "terms": Terms(temperature=2.0)},
            r"sparse targets without a tail are log-probabilities at temperature 1, but the temperature is 2.0",
        ),
        (
            {"teacher": SAMPLES, "terms": Terms("reverse_kl")},
            r"divergence='reverse_kl' cannot be computed from weighted samples\. Use one of forward_kl, or",
        ),
        (
            {"teacher": TeacherSparse(KNOWN[:, None], torch.zeros(3, 1)), "terms": Terms("decoupled")},
            r"divergence='decoupled' cannot be computed from some columns and a bucket\. Use one of forward_kl",
        ),
    ],
)
def test_contradicting_settings_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        fused_linear_distillation(ROWS, HEAD, **{"teacher": SAME, "terms": Terms(), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"student_hidden": torch.zeros(1, 3, 4)},
            r"hidden rows are \[1, 3, 4\] and its head is \[5, 4\]: rows must be \[n 4\]",
        ),
        ({"student_hidden": torch.zeros(3, 6)}, r"the student's hidden rows are \[3, 6\] and its head is \[5, 4\]"),
        ({"student_hidden": ROWS.bfloat16()}, r"hidden rows are torch.bfloat16 and its head is torch.float32"),
        ({"teacher": TeacherHidden(torch.zeros(3, 2), HEAD)}, r"the teacher's hidden rows are \[3, 2\]"),
        ({"teacher": TeacherHidden(torch.zeros(2, 4), HEAD)}, r"hidden rows are \[2, 4\]; the student has 3 rows"),
        (
            {"teacher": TeacherLogits(torch.zeros(4, 5))},
            r"logits are \[4, 5\]; the student has 3 rows, so they must be \[3 columns\]",
        ),
        ({"teacher": TeacherSparse(KNOWN[:, None], torch.zeros(3, 2))}, r"ids \[3, 1\] and logits \[3, 2\] differ"),
        ({"teacher": replace(SAMPLES, weights=torch.ones(3, 2))}, r"sparse ids \[3, 1\] and weights \[3, 2\] differ"),
        ({"row_weights": torch.ones(2)}, r"row_weights: the shape is \[2\], but must be \[3\]"),
        ({"labels": torch.tensor([0, 1])}, r"labels: the shape is \[2\], but must be \[3\]"),
        ({"labels": torch.tensor([0, 1, 5])}, r"label 5: must be a column, 0 to 4, or -100"),
        ({"labels": torch.tensor([0, -1, 4])}, r"label -1: must be a column, 0 to 4"),
    ],
)
def test_mismatched_data_raise(options: dict[str, Any], message: str) -> None:
    given = {"student_hidden": ROWS, "student_head": HEAD, "teacher": SAME, "terms": Terms(), **options}
    with pytest.raises(DataError, match=message):
        fused_linear_distillation(given.pop("student_hidden"), given.pop("student_head"), **given)
