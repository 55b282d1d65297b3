"""Documents packed into one row do not attend to each other, in training, evaluation and prediction.

transformers uses `position_ids` only without a mask, but `tokenizer.pad` adds one. See also `test_padding_free.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, default_data_collator

from hf_distill import DataError, Distiller
from hf_distill.models import packing
from tests.heads import HEADS
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import make, softened_kl

LLAMA = HEADS["llama_causal_lm"]
WIDTH = 24
T = 3.0
PACKED = {"remove_unused_columns": False, "max_steps": 1, "per_device_train_batch_size": 2}
DROP = r"packed into a row, and the student .* Drop attention_mask from the batch"


def one_by_one(student: Any, teacher: Any, examples: list[dict[str, Any]]) -> float:
    """Return the mean over every token that counts, for each document alone, without padding and packing."""
    found = []
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        counted = torch.tensor(example["labels"])[1:] != -100
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids).logits[0, :-1][counted] for model in (student, teacher))
        found.append(softened_kl(ours, theirs, T))
    return torch.cat(found).mean().item()


@pytest.mark.parametrize("cut", [(6, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2_causal_lm", "llama_causal_lm"])
def test_a_packed_step_equals_its_documents(tmp_path, name: str, attention: str, cut: tuple[int, int]) -> None:
    student, other = (HEADS[name].make(seed, attn_implementation=attention) for seed in (1, 2))
    for teacher in (copy.deepcopy(student), other):
        expected = one_by_one(student, teacher, HEADS[name].examples(6))
        trainer = make(
            tmp_path, copy.deepcopy(student), teacher, train_dataset=HEADS[name].examples(6),
            data_collator=DataCollatorWithFlattening(return_tensors="pt"), remove_unused_columns=False, alpha=1.0,
            temperature=T, max_steps=1, logging_steps=1, per_device_train_batch_size=cut[0],
            gradient_accumulation_steps=cut[1],
        )  # fmt: skip
        trainer.train()
        assert trainer.state.log_history[0]["loss/logits"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert expected > 0.01


def rows(documents: list[dict[str, Any]], **more: list[int]) -> list[dict[str, Any]]:
    """Return rows of a fixed length with two documents; the filler is a separate text without labels."""
    made = []
    for pair in zip(documents[::2], documents[1::2], strict=True):
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for one in pair:
            row["input_ids"] += one["input_ids"]
            row["labels"] += [-100, *one["labels"][1:]]
            row["position_ids"] += range(len(one["input_ids"]))
        rest = WIDTH - len(row["input_ids"])
        assert rest >= 0
        row["input_ids"] += [0] * rest
        row["labels"] += [-100] * rest
        row["position_ids"] += range(rest)
        made.append({**row, **more})
    return made


def test_packed_rows_with_a_mask_of_ones_raise_and_work_without_it(tmp_path) -> None:
    documents = LLAMA.examples(8)
    for data, collator in (
        (rows(documents), DataCollatorForSeq2Seq(tokenizer(40))),  # adds the mask itself
        (rows(documents, attention_mask=[1] * WIDTH), default_data_collator),
    ):
        trainer = make(
            tmp_path, LLAMA.make(1), LLAMA.make(2), train_dataset=data, data_collator=collator, **PACKED
        )  # fmt: skip
        with pytest.raises(DataError, match=DROP):
            trainer.train()
        assert trainer.state.global_step == 0
    student, teacher = LLAMA.make(1), LLAMA.make(2)
    expected = one_by_one(student, teacher, documents)
    trainer = make(
        tmp_path, student, teacher, train_dataset=rows(documents), data_collator=default_data_collator, alpha=1.0,
        temperature=T, logging_steps=1, gradient_accumulation_steps=2, **PACKED,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss/logits"] == pytest.approx(expected, rel=1e-5)


def of(positions: list[list[int]], mask: list[list[int]]) -> dict[str, Tensor]:
    ids = torch.arange(len(positions[0]))[None].expand(len(positions), -1) % 7 + 1
    return {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.tensor(positions),
        "attention_mask": torch.tensor(mask),
    }


LAID_OUT = {
    "two texts": (of([[0, 1, 2, 0, 1]], [[1] * 5]), True),
    "in one row of two": (of([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]], [[1] * 5] * 2), True),
    "padding between them": (of([[0, 1, 0, 0, 1]], [[1, 1, 0, 1, 1]]), True),
    "padded left": (of([[1, 1, 0, 1, 0]], [[0, 0, 1, 1, 1]]), True),
    "the first is the end of a longer one": (of([[7, 8, 0, 1, 2]], [[1] * 5]), True),
    "a text of one token": (of([[0, 0, 1, 2, 3]], [[1] * 5]), True),
    "numbered from 2": (of([[2, 3, 2, 3, 4]], [[1] * 5]), True),
    "a mask that numbers them": (of([[0, 1, 2, 0, 1]], [[1, 1, 1, 2, 2]]), True),
    "one text": (of([[0, 1, 2, 3, 4]], [[1] * 5]), False),
    "one text, padded left, ones there": (of([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]], [[0, 0, 1, 1, 1], [1] * 5]), False),
    "one text, padded left, zeros there": (of([[0, 0, 0, 1, 2]], [[0, 0, 1, 1, 1]]), False),
    "one text, padded right": (of([[0, 1, 2, 0, 0]], [[1, 1, 1, 0, 0]]), False),
    "one text, padded amid": (of([[0, 1, 1, 2, 3]], [[1, 1, 0, 1, 1]]), False),
    "one text, nothing attended beside it": (of([[0, 1, 2, 3, 4], [0] * 5], [[1] * 5, [0] * 5]), False),
    "positions that some share": (of([[0, 1, 1, 1, 2]], [[1] * 5]), False),
}


@pytest.mark.parametrize("layout", LAID_OUT)
def test_detection_of_packed_rows_with_a_mask(layout: str) -> None:
    """Models are not run at all for other rows."""
    batch, is_packed = LAID_OUT[layout]
    ran: list[Any] = []
    models = LLAMA.make(1), LLAMA.make(2)
    for model in models:
        model.register_forward_pre_hook(lambda *_: ran.append(1))
    distiller = Distiller(*models)
    if not is_packed:
        distiller.begin_step([batch])
        assert not ran
        return
    for _ in range(2):
        with pytest.raises(DataError, match="Drop attention_mask"):
            distiller.begin_step([LAID_OUT["one text"][0], batch])
    assert len(ran) == 8  # two models, with and without the mask, two first texts: once


def test_a_mask_of_pairs_is_accepted() -> None:
    ids = torch.tensor([[1, 2, 3, 1, 2]])
    apart = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().bool()[None, None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 0, 1, 2]]), "attention_mask": apart}
    student, teacher = LLAMA.make(1).double(), LLAMA.make(2).double()
    distiller = Distiller(student, teacher, alpha=1.0)
    free = {name: value for name, value in batch.items() if name != "attention_mask"}
    found, expected = (distiller(student, one).loss.item() for one in (batch, free))
    assert found == pytest.approx(expected, rel=1e-6)


class FlashLike(hf.LlamaForCausalLM):
    """Like flash attention in transformers: a mask of ones counts as none, and only one-row batches are split.

    Some programs patch it so that the mask numbers the texts.
    """

    patched = False

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **others: Any
    ) -> Any:
        if attention_mask is not None and (bool((attention_mask > 1).any()) if self.patched else attention_mask.all()):
            attention_mask = None
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids if len(input_ids) == 1 else None,
            **others,
        )


class Patched(FlashLike):
    patched = True


def test_the_mask_is_tried_unchanged() -> None:
    models = [kind(LLAMA.make(1, use_cache=False).config) for kind in (FlashLike, FlashLike, Patched, Patched)]
    flash, patched = Distiller(*models[:2]), Distiller(*models[2:])
    flash.begin_step([LAID_OUT["two texts"][0]])
    padded = of([[0, 1, 0, 1, 0]], [[1, 1, 1, 1, 0]])
    several = of([[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]], [[1] * 5] * 2)
    one_row = r"In a batch of one row, without attention_mask, they are kept apart"
    free = {name: value for name, value in several.items() if name != "attention_mask"}
    for batch, message in ((padded, "Drop attention_mask"), (several, one_row), (free, one_row)):
        with pytest.raises(DataError, match=message):
            flash.begin_step([batch])
        flash.begin_step([LAID_OUT["two texts"][0]])
    numbered = LAID_OUT["a mask that numbers them"][0]
    patched.begin_step([numbered])
    with pytest.raises(DataError, match="Drop attention_mask"):
        patched.begin_step([LAID_OUT["two texts"][0]])


@pytest.mark.parametrize("message", ["return_flash_attn_kwargs", "return_seq_idx"])
def test_document_boundaries_that_a_model_ignores_raise(message: str) -> None:
    """Without positions, only flash attention or a recurrent model can use the boundaries of texts."""
    collator = DataCollatorWithFlattening(return_tensors="pt", return_position_ids=False, **{message: True})
    distiller = Distiller(LLAMA.make(1), LLAMA.make(2))
    for count, told_apart in ((4, False), (1, True)):
        batch = collator(LLAMA.examples(count))
        assert batch.get("position_ids") is None and batch.get("attention_mask") is None
        if told_apart:
            distiller.begin_step([batch])
            continue
        with pytest.raises(DataError, match=r"packed into a row, and the student .* The batch has no position_ids"):
            distiller.begin_step([batch])


def test_all_processes_try_sharded_models_if_one_has_packed_rows(monkeypatch) -> None:
    """A sharded forward waits for every process. Here another process has packed rows."""
    monkeypatch.setattr(packing, "several_processes", lambda: True)
    monkeypatch.setattr(packing, "is_sharded", lambda model: True)
    monkeypatch.setattr(packing.dist, "all_reduce", lambda found, op: found.copy_(torch.tensor([1, 0, 1, 0, 0])))
    with pytest.raises(DataError, match="Drop attention_mask"):
        Distiller(LLAMA.make(1), LLAMA.make(2)).begin_step([LAID_OUT["one text"][0]])


def opt(seed: int) -> nn.Module:
    """Numbers positions but does not mask other documents."""
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(seed)
    return hf.OPTForCausalLM(hf.OPTConfig(**shape, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64))


@pytest.mark.parametrize("way", ["evaluate", "predict"])
def test_evaluation_and_prediction_reject_packed_rows_like_training(tmp_path, way: str) -> None:
    documents = LLAMA.examples(4)

    def run(student: Any, teacher: Any, collator: Any, *, data: Any = documents, ask_teacher: bool = False) -> Any:
        trainer = make(
            tmp_path, student, teacher, data_collator=collator, evaluate_with_teacher=ask_teacher,
            remove_unused_columns=False,
        )  # fmt: skip
        return getattr(trainer, way)(data)

    flat = DataCollatorWithFlattening(return_tensors="pt")
    message = r"packed into a row, and the {} \(OPTForCausalLM\) lets each see those before it"
    with pytest.raises(DataError, match=message.format("student")):
        run(opt(1), LLAMA.make(2), flat)
    with pytest.raises(DataError, match=message.format("teacher")):
        run(LLAMA.make(1), opt(2), flat, ask_teacher=True)
    with pytest.raises(DataError, match=DROP):
        run(LLAMA.make(1), LLAMA.make(2), default_data_collator, data=rows(documents, attention_mask=[1] * WIDTH))
    run(LLAMA.make(1), opt(2), flat)  # the teacher is not used
    run(opt(1), opt(2), LLAMA.collate, ask_teacher=True)
