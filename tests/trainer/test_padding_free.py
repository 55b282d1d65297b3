"""Padding-free, packed and length-grouped batches give the step of padded batches; so do heads of two padded widths."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import DataCollatorWithFlattening

from hf_distill import DataError, Distiller, HiddenMatch
from tests.heads import HEADS
from tests.tiny_tokenizers import tokenizer
from tests.trainer.steps import in_double
from tests.trainer.tiny import make, softened_kl, update_difference, weights

LLAMA, T = HEADS["llama_causal_lm"], 3.0
FLAT = partial(DataCollatorWithFlattening, return_tensors="pt")


def one_step(
    folder: Any, name: str, collator: Any, cut: tuple[int, int], **settings: Any
) -> tuple[Any, dict[str, float]]:
    """Return weights after a step on eight prompt-masked documents, with labels and hidden states, and the log."""
    student, teacher = (HEADS[name].make(seed).double() for seed in (1, 2))
    trainer = make(
        folder, student, teacher, train_dataset=HEADS[name].examples(8), data_collator=collator, alpha=0.5,
        temperature=T, objectives=HiddenMatch("last", weight=0.3), remove_unused_columns=False, max_steps=1,
        logging_steps=1, per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1], **settings,
    )  # fmt: skip
    trainer.train()
    logged = {name: value for name, value in trainer.state.log_history[0].items() if name.startswith("loss")}
    return weights(student), logged


@pytest.mark.parametrize("name", ["gpt2_causal_lm", "llama_causal_lm"])
def test_every_layout_of_documents_gives_the_same_step(tmp_path, name: str) -> None:
    """Flattened whole, in parts, with flash attention's arguments, fused, and grouped by length."""
    padded = partial(in_double, HEADS[name])
    expected, expected_logs = one_step(tmp_path, name, padded, (8, 1))
    start = weights(HEADS[name].make(1).double())
    laid_out: list[tuple[Any, tuple[int, int], dict[str, Any]]] = [
        (FLAT(), (8, 1), {}),
        (FLAT(), (3, 3), {}),
        (FLAT(return_flash_attn_kwargs=True), (4, 2), {}),
        (FLAT(), (4, 2), {"fused_loss": True}),
        (padded, (2, 4), {"train_sampling_strategy": "group_by_length"}),
    ]
    for collator, cut, settings in laid_out:
        found, logged = one_step(tmp_path, name, collator, cut, **settings)
        assert update_difference(found, expected, start) < 1e-6
        assert set(logged) == {"loss", "loss/labels", "loss/logits", "loss/hidden"}
        assert logged == pytest.approx(expected_logs, rel=1e-6)


def test_a_batch_of_packed_rows() -> None:
    """Two packed rows per batch, with documents separated only by their positions."""
    documents = LLAMA.examples(5)
    student, teacher = LLAMA.make(1), LLAMA.make(2)
    found = []
    for one in documents:
        ids, counted = torch.tensor([one["input_ids"]]), torch.tensor(one["labels"])[1:] != -100
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids).logits[0, :-1][counted] for model in (student, teacher))
        found.append(softened_kl(ours, theirs, T))
    rows: list[dict[str, list[int]]] = []
    for packed in (documents[:3], documents[3:]):
        row = {"input_ids": [], "labels": [], "position_ids": []}
        for one in packed:
            row["input_ids"] += one["input_ids"]
            row["labels"] += [-100, *one["labels"][1:]]
            row["position_ids"] += range(len(one["input_ids"]))
        rows.append(row)
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        name: torch.tensor([row[name] + [filled] * (longest - len(row[name])) for row in rows])
        for name, filled in (("input_ids", 0), ("labels", -100), ("position_ids", 0))
    }
    loss = Distiller(student, teacher, alpha=1.0, temperature=T)(student, batch).loss.item()
    assert loss == pytest.approx(torch.cat(found).mean().item(), rel=1e-5)


def test_models_that_mix_packed_documents_raise(tmp_path) -> None:
    """OPT numbers positions but does not mask; the same models are accepted with padded batches."""
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.OPTConfig(**shape, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64, pad_token_id=0)
    leaks = hf.OPTForCausalLM(config)
    settings = {"train_dataset": LLAMA.examples(4), "remove_unused_columns": False, "max_steps": 1}
    for student, teacher, whose in ((leaks, LLAMA.make(2), "student"), (LLAMA.make(1), leaks, "teacher")):
        logged = rf"packed into a row, and the {whose} \(OPTForCausalLM\) lets each see those before it"
        modes = [module.training for module in student.modules()]
        with pytest.raises(DataError, match=logged):
            make(tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), data_collator=FLAT(), **settings).train()
        batch = FLAT()(LLAMA.examples(4))
        with pytest.raises(DataError, match="Use a collator that pads"):
            Distiller(student, copy.deepcopy(teacher)).begin_step([batch])
        assert [module.training for module in student.modules()] == modes
        make(tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), data_collator=LLAMA.collate, **settings).train()
        one_a_row = {"input_ids": batch["input_ids"], "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
        Distiller(student, copy.deepcopy(teacher), alpha=1.0).begin_step([one_a_row])  # the batch is not packed


TOKENS = 34


def padded_to(seed: int, width: int) -> Any:
    """Return the model of that seed over the tokenizer's vocabulary, followed by rows of noise."""
    narrow, wide = LLAMA.make(seed, vocab_size=TOKENS), LLAMA.make(seed + 100, vocab_size=width)
    values = narrow.state_dict()
    with torch.no_grad():
        for name, value in wide.state_dict().items():
            value[tuple(slice(size) for size in values[name].shape)] = values[name]
    return wide.double()


@pytest.mark.parametrize("flattened", [False, True])
def test_heads_padded_to_different_widths_give_the_same_step(tmp_path, flattened: bool) -> None:
    """40 columns of the student and 36 of the teacher for 34 tokens: as with 34 each, in training and evaluation.

    (Like Qwen2.5's 151936 and 152064 columns for 151665 tokens.)
    """
    examples = [{name: [v if v < 0 else v % TOKENS for v in x] for name, x in e.items()} for e in LLAMA.examples(8)]
    collator = FLAT() if flattened else partial(in_double, LLAMA)
    found = []
    for widths in ((TOKENS, TOKENS), (40, 36)):
        student = padded_to(1, widths[0])
        trainer = make(
            tmp_path, student, padded_to(2, widths[1]), train_dataset=examples, eval_dataset=examples,
            processing_class=tokenizer(TOKENS), teacher_processing_class=tokenizer(TOKENS), data_collator=collator,
            alpha=1.0, temperature=T, evaluate_with_teacher=True, remove_unused_columns=False, max_steps=1,
            logging_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train()
        logged = {**trainer.state.log_history[0], **trainer.evaluate()}
        names = ("loss/logits", "grad_norm", "eval_divergence", "eval_teacher_agreement")
        found.append(({name: logged[name] for name in names}, student.lm_head.weight[:TOKENS].detach()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6) and found[0][0]["loss/logits"] > 0.1
    torch.testing.assert_close(found[1][1], found[0][1])
