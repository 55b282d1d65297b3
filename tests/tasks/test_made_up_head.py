"""A new kind of head fits in one file: a made-up head, whose rows are pairs of neighbouring tokens, obeys the laws.

The model, its task and its conformance rows are all defined here; the package does not know them.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_outputs import TokenClassifierOutput

from hf_distill.tasks import TASKS, Batch, infer
from hf_distill.tasks.base import IGNORED, PositionTask
from tests.heads import HEADS, LABELS, Example, Head
from tests.laws import (
    conformance,
    test_l1_equality,
    test_l2_no_rows,
    test_l3_padding,
    test_l4_accumulation,
    test_l5_temperature,
    test_l9_teacher,
)
from tests.test_architecture import FILES, name_of
from tests.trainer.tiny import make

NAME = "bert_pairs"
DIVERGENCES = ("forward_kl", "jensen_shannon", "total_variation", "hard")


class BertForPairs(hf.BertPreTrainedModel):
    """Predicts the relation of each token to the next one."""

    def __init__(self, config: hf.BertConfig) -> None:
        super().__init__(config)
        self.bert = hf.BertModel(config, add_pooling_layer=False)
        self.relation = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> TokenClassifierOutput:
        x = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.relation(torch.cat((x[:, :-1], x[:, 1:]), -1))  # [b t-1 v]
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)


class Pairs(PositionTask):
    """One row for each token and its successor; the label of a pair is at its second token."""

    kind = "pairs"
    matched_by = "labels"
    has_classes = True

    def keep(self, batch: Batch) -> Tensor:
        mask = batch["attention_mask"].bool()
        return (mask[:, :-1] & mask[:, 1:]).flatten()

    def targets(self, batch: Batch) -> Tensor | None:
        return None if batch.get("labels") is None else batch["labels"][:, 1:].flatten()

    def label_count(self, batch: Batch) -> Tensor:
        return (batch["labels"][:, 1:] != IGNORED).sum()


def write(rng: random.Random, index: int) -> Example:
    length = 3 + index % 6
    labels = [rng.randrange(LABELS) if rng.random() < 0.7 else IGNORED for _ in range(length)]
    labels[0], labels[-1] = IGNORED, rng.randrange(LABELS)
    return {"input_ids": [rng.randrange(1, 40) for _ in range(length)], "labels": labels}


HEAD = Head(
    kind="pairs",
    model_class=BertForPairs,
    config_class=hf.BertConfig,
    settings={
        **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 16, "num_labels": LABELS},
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    },
    write=write,
    fill={"input_ids": 0, "labels": IGNORED},
    mask=("attention_mask", "input_ids"),
)


def silent(batch: Batch) -> Batch:
    return {
        **batch,
        "attention_mask": torch.zeros_like(batch["attention_mask"]),
        "labels": torch.full_like(batch["labels"], IGNORED),
    }


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the head to the catalogue and the tables for one test."""
    monkeypatch.setitem(TASKS, "pairs", Pairs)
    monkeypatch.setitem(HEADS, NAME, HEAD)
    monkeypatch.setitem(conformance.TASK_ROWS, "pairs", conformance.TaskRow(silence=silent))
    original = infer.kind_of_class
    monkeypatch.setattr(
        infer, "kind_of_class", lambda name, config: "pairs" if name == "BertForPairs" else original(name, config)
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_laws_hold(divergence: str) -> None:
    test_l1_equality.test_equal_models_have_zero_loss_and_gradient(NAME, divergence)
    test_l1_equality.test_different_models_have_nonzero_loss_and_gradient(NAME, divergence)
    test_l2_no_rows.test_a_silent_micro_batch_does_not_change_the_others(NAME, divergence)
    test_l3_padding.test_more_padding_changes_nothing(NAME, divergence)
    test_l3_padding.test_rows_that_are_not_kept_are_never_read(NAME, divergence, float("nan"))
    test_l4_accumulation.test_accumulation_changes_nothing(NAME, divergence)
    test_l9_teacher.test_only_the_student_gets_a_gradient(NAME, divergence)
    if divergence != "hard":  # it is not zero at equality, and T scales its gradient differently
        test_l5_temperature.test_gradient_is_independent_of_a_high_temperature(NAME, divergence)


def test_each_term_alone_and_in_two_processes() -> None:
    for alpha in (0.0, 1.0):
        test_l4_accumulation.test_accumulation_is_exact_for_each_term_alone(NAME, alpha)
    for parts in (1, 2):
        test_l4_accumulation.test_two_processes_equal_one(NAME, parts)


def test_the_trainer_trains_a_made_up_head(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        HEAD.make(0),
        HEAD.make(1),
        train_dataset=HEAD.examples(8),
        data_collator=HEAD.collate,
        max_steps=2,
        logging_steps=1,
    )
    trainer.train()
    assert {"loss/labels", "loss/logits"} <= trainer.state.log_history[0].keys()


def test_no_code_outside_tasks_compares_kinds() -> None:
    """The facts about a head belong in its `Task`."""
    outside = [path for path in FILES if path.parent.name != "tasks"]
    assert [name_of(path) for path in outside if "task.kind" in path.read_text(encoding="utf-8")] == []
