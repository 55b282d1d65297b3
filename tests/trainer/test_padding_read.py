"""One warning for a student that depends on padding: positions counted from left padding, another padding token."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from hf_distill import Distiller
from tests.heads import HEADS
from tests.teachers.test_padding import ROWS, made
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import bert, make, padded, softened_kl

LOGGER = "hf_distill.models.padding"
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
TEXTS = [{"input_ids": row, "labels": row} for row in ([1, 5, 6, 7, i + 4][: 3 + i % 3] for i in range(8))]


def gpt2(seed: int, layers: int = 1) -> Any:
    torch.manual_seed(seed)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**{**GPT2, "n_layer": layers}))
    model.transformer.wte.weight.data.mul_(30)
    model.transformer.wpe.weight.data.mul_(50)
    return model


def on(side: str, *, positions: bool = False) -> Any:
    """Return a collator that pads on this side."""

    def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(one["input_ids"]) for one in features)

        def filled(name: str, value: int) -> Tensor:
            rows = []
            for one in features:
                values = [1] * len(one["input_ids"]) if name == "mask" else list(one[name])
                gap = [value] * (longest - len(values))
                rows.append(gap + values if side == "left" else values + gap)
            return torch.tensor(rows)

        batch = {"input_ids": filled("input_ids", 0), "attention_mask": filled("mask", 0)}
        if "labels" in features[0]:
            batch["labels"] = filled("labels", -100)
        if positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return batch

    return collate


def row_by_row(student: Any, teacher: Any) -> float:
    """Return the divergence loss with each text alone and unpadded, in float64."""
    values = []
    for one in TEXTS:
        ids = torch.tensor([one["input_ids"]])
        with torch.no_grad():
            ours, theirs = (model.double().eval()(ids).logits[0, :-1] for model in (student, teacher))
        values.append(softened_kl(ours, theirs, 2.0))
    student.float(), teacher.float()
    return float(torch.cat(values).mean())


def trained(tmp_path: Any, student: Any, teacher: Any, collate: Any, **settings: Any) -> float:
    trainer = make(
        tmp_path, student, teacher, alpha=1.0, temperature=2.0, train_dataset=TEXTS, data_collator=collate,
        max_steps=1, learning_rate=0.0, per_device_train_batch_size=8, logging_steps=1, **settings,
    )  # fmt: skip
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_absolute_positions_with_left_padding_give_a_warning(tmp_path, caplog, side: str, positions: bool) -> None:
    student, teacher = gpt2(0), gpt2(1, layers=2)
    expected = row_by_row(copy.deepcopy(student), copy.deepcopy(teacher))
    with caplog.at_level(logging.WARNING, LOGGER):
        found = trained(tmp_path, student, teacher, on(side, positions=positions))
    is_off = side == "left" and not positions
    assert (found == pytest.approx(expected, rel=1e-4)) is not is_off
    assert len(caplog.records) == is_off
    if is_off:
        both = "the student (GPT2LMHeadModel) and the teacher (GPT2LMHeadModel)"
        for word in (both, 'padding_side = "right"', "attention_mask.cumsum(-1) - 1).clamp(min=0)"):
            assert word in caplog.text


@pytest.mark.parametrize("name", ["llama_causal_lm", "t5_seq2seq", "bert_single_label", "gpt2_causal_lm"])
def test_which_models_count_positions_from_padding(name: str, caplog) -> None:
    """T5 and Llama have relative positions; GPT-2 and BERT count padding."""
    head = HEADS[name]
    student, batch = head.make(0), head.batch(4)
    for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        for column in ("input_ids", "attention_mask"):
            batch[column][row] = batch[column][row].roll(batch[column].shape[1] - length)
    modes = [module.training for module in student.train().modules()]
    with caplog.at_level(logging.WARNING, LOGGER):
        distiller = Distiller(student, head.make(1), alpha=1.0)
        state = torch.get_rng_state()
        for _ in range(3):
            distiller.begin_step([batch])
    assert [module.training for module in student.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert len(caplog.records) == (name in ("gpt2_causal_lm", "bert_single_label"))


@pytest.mark.parametrize("own", [False, True], ids=["the student's ids", "its own"])
def test_a_teacher_with_absolute_positions_gives_a_warning(caplog, own: bool) -> None:
    """For a student with relative positions; with teacher ids, their padding side decides."""
    student, teacher = made("llama", pad=0), made("gpt2", pad=0)
    left, right = on("left")(ROWS), on("right")(ROWS)
    batch = left if not own else {**right, **{f"teacher_{name}": value for name, value in left.items()}}
    with caplog.at_level(logging.WARNING, LOGGER):
        Distiller(student, teacher, alpha=1.0).begin_step([batch])
        (record,) = caplog.records
        assert "the outputs of the teacher (GPT2ForSequenceClassification) for a text" in record.getMessage()
        caplog.clear()
        on_the_right = {**left, **{f"teacher_{name}": value for name, value in right.items()}} if own else right
        Distiller(student, teacher, alpha=1.0).begin_step([on_the_right])
    assert not caplog.records


def xlnet(seed: int) -> Any:
    torch.manual_seed(seed)
    config = hf.XLNetConfig(
        vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=32, num_labels=3, dropout=0.0, summary_last_dropout=0.0,
        pad_token_id=0,
    )  # fmt: skip
    return hf.XLNetForSequenceClassification(config)


@pytest.mark.parametrize("side", ["right", "left"])
def test_xlnet_takes_the_last_position_for_the_last_token(caplog, side: str) -> None:
    with caplog.at_level(logging.WARNING, LOGGER):
        Distiller(xlnet(0), xlnet(1), alpha=1.0).begin_step([on(side)(ROWS)])
    assert len(caplog.records) == (side == "right")
    if side == "right":
        both = "the student (XLNetForSequenceClassification) and the teacher (XLNetForSequenceClassification)"
        assert both in caplog.text and 'tokenizer.padding_side = "left"' in caplog.text


def test_xlnet_of_tokens_does_not_read_padding_on_the_right(caplog) -> None:
    models = [hf.XLNetForTokenClassification(xlnet(seed).config) for seed in (0, 1)]
    batch = on("right")([{**row, "labels": row["input_ids"]} for row in TEXTS])
    batch["labels"] = batch["labels"].clamp(max=2)
    with caplog.at_level(logging.WARNING, LOGGER):
        Distiller(*models, alpha=1.0).begin_step([batch])
    assert not caplog.records


def test_regression_and_empty_rows_are_checked(caplog) -> None:
    student = made("gpt2", pad=0, num_labels=1, problem_type="regression")
    batch = on("left")(ROWS)
    batch["attention_mask"][0] = 0
    with caplog.at_level(logging.WARNING, LOGGER):
        Distiller(student, made("llama", pad=0, num_labels=1), alpha=1.0).begin_step([batch])
    assert "the outputs of the student (GPT2ForSequenceClassification) for a text" in caplog.text


def test_no_trial_without_a_teacher(tmp_path, caplog) -> None:
    student = gpt2(0)
    calls: list[int] = []
    student.register_forward_pre_hook(lambda *_: calls.append(1))
    make(tmp_path, student, train_dataset=TEXTS, data_collator=on("left"), alpha=0.0, max_steps=1,
         per_device_train_batch_size=8).train()  # fmt: skip
    assert len(calls) == 1 and not caplog.records


# The student's padding token.


def test_a_custom_loop_aligns_the_padding_token_with_the_tokenizer(caplog) -> None:
    """As `Trainer` does; the saved model then also uses the right token."""
    student = made("llama", pad=3)
    with caplog.at_level(logging.WARNING, LOGGER):
        distiller = Distiller(student, made("llama", pad=3, seed=2), alpha=1.0, processing_class=tokenizer(23))
        assert student.config.pad_token_id == 3  # before any training
        distiller(student, padded(ROWS))
    assert student.config.pad_token_id == 0
    (record,) = [one for one in caplog.records if one.name == LOGGER]
    assert "config.pad_token_id was 3, and its tokenizer pads with 0" in record.getMessage()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_without_a_tokenizer_another_padding_token_gives_a_warning(tmp_path, caplog, name: str) -> None:
    student = bert(pad_token_id=3) if name == "bert" else made(name, pad=3)
    with caplog.at_level(logging.WARNING, LOGGER):
        make(tmp_path, student, bert(seed=1), train_dataset=ROWS, alpha=1.0, max_steps=2).train()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (name != "bert")  # BERT uses the first token
    if messages:
        assert "student's config.pad_token_id is 3, and the batch is padded with 0" in messages[0]
        assert "processing_class=" in messages[0]


def test_an_evaluation_before_training_aligns_the_padding_token(tmp_path, caplog) -> None:
    """`Trainer` aligns it at the start of training; an evaluation with the teacher does too."""
    student, teacher = made("llama", pad=3), made("llama", pad=0)
    teacher.load_state_dict(student.state_dict())
    rows = [row for row in ROWS if row["input_ids"][-1] != 3]
    trainer = make(
        tmp_path, student, teacher, alpha=1.0, train_dataset=rows, eval_dataset=rows, evaluate_with_teacher=True,
        processing_class=tokenizer(23),
    )  # fmt: skip
    assert trainer.evaluate()["eval_teacher_agreement"] == 1.0
    assert student.config.pad_token_id == 0
