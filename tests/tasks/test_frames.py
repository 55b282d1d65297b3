"""CTC frames match the lengths that the model computes; embeddings are pooled as by hand."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from hf_distill import SettingError
from hf_distill.tasks import CTC, Embedding
from hf_distill.vocabulary import HeadAlignment
from tests.heads import HEADS

CTC_HEADS = [name for name, head in HEADS.items() if head.kind == "ctc"]


@pytest.mark.parametrize("name", CTC_HEADS)
def test_frames_match_those_of_the_models_loss(name: str) -> None:
    model, batch = HEADS[name].make(), HEADS[name].batch(8)
    own = torch.nn.functional.ctc_loss
    with mock.patch("torch.nn.functional.ctc_loss", side_effect=own) as spied, torch.no_grad():
        logits = model(**batch).logits
    lengths = spied.call_args.args[2]
    task = CTC.from_model(model)
    kept = task.keep(batch).view(logits.shape[:2])
    assert kept.sum(-1).tolist() == lengths.tolist()
    assert len(set(lengths.tolist())) > 2
    assert all(row[:n].all() and not row[n:].any() for row, n in zip(kept, lengths, strict=True))
    assert task.rows(batch) == logits.shape[0] * logits.shape[1]
    assert task.count(batch) == lengths.sum()
    assert task.label_count(batch) == 8


@pytest.mark.parametrize("name", CTC_HEADS)
def test_without_a_mask_all_frames_count(name: str) -> None:
    model, batch = HEADS[name].make(), HEADS[name].batch(2)
    with torch.no_grad():
        frames = model(batch["input_values"]).logits.shape[1]
    assert CTC.from_model(model).keep({"input_values": batch["input_values"]}).sum() == 2 * frames


def test_the_reduction_of_the_models_loss_is_read_from_its_config() -> None:
    sums = {name: CTC.from_model(HEADS[name].make()).sums_over_examples for name in CTC_HEADS}
    assert sums == {"wav2vec2_ctc_mean": False, "hubert_ctc_sum": True}


def test_a_custom_length_function_and_a_model_without_one() -> None:
    task = CTC(lambda samples: samples // 10)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 25:] = 0
    assert task.keep({"attention_mask": mask}).view(2, 4).sum(-1).tolist() == [4, 2]
    with pytest.raises(SettingError, match=r"SimpleNamespace has no rule for the length.*CTC\(frame_lengths\)"):
        CTC.from_model(SimpleNamespace())


HIDDEN = torch.tensor([[[1.0], [2.0], [3.0], [99.0]], [[5.0], [6.0], [7.0], [8.0]]])
RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
LEFT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("pooling", "mask", "pooled"),
    [
        ("mean", RIGHT, [2.0, 6.5]),
        ("mean", LEFT, [(2 + 3 + 99) / 3, 6.5]),
        ("first", RIGHT, [1.0, 5.0]),
        ("first", LEFT, [2.0, 5.0]),
        ("last", RIGHT, [3.0, 8.0]),
        ("last", LEFT, [99.0, 8.0]),
        ("mean", None, [(1 + 2 + 3 + 99) / 4, 6.5]),
        ("first", None, [1.0, 5.0]),
        ("last", None, [99.0, 8.0]),
    ],
)
def test_pooling_by_hand(pooling: str, mask: torch.Tensor | None, pooled: list[float]) -> None:
    batch = {} if mask is None else {"attention_mask": mask}
    found = Embedding(pooling=pooling).read({"last_hidden_state": HIDDEN}, batch, HeadAlignment(), teacher=False)
    assert found.flatten().tolist() == pytest.approx(pooled)


def test_nan_in_masked_hidden_states_is_not_read() -> None:
    hidden = HIDDEN.clone()
    hidden[0, 3] = float("nan")
    found = Embedding().read({"last_hidden_state": hidden}, {"attention_mask": RIGHT}, HeadAlignment(), teacher=False)
    assert found.flatten().tolist() == [2.0, 6.5]


def test_the_teacher_is_pooled_with_its_own_mask() -> None:
    batch = {"attention_mask": LEFT, "teacher_attention_mask": RIGHT}
    task, outputs = Embedding(), {"last_hidden_state": HIDDEN}
    assert task.read(outputs, batch, HeadAlignment(), teacher=True).flatten().tolist() == [2.0, 6.5]
    assert task.read(outputs, batch, HeadAlignment(), teacher=False)[0].item() == pytest.approx(104 / 3)


def test_an_unknown_pooling_is_rejected() -> None:
    with pytest.raises(SettingError, match=r"pooling='max': allowed are mean, first, last"):
        Embedding(pooling="max")
