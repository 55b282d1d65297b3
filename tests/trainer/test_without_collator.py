"""A `datasets.Dataset` and no collator, as many a script has it: Trainer's own default is enough for every head."""

from __future__ import annotations

import datasets
import pytest

from hf_distill import DistillationTrainer
from tests.heads import HEADS, of_each_kind
from tests.trainer.steps import alphas_of
from tests.trainer.tiny import arguments


@pytest.mark.parametrize("name", of_each_kind(2))
def test_a_dataset_alone(tmp_path, name: str) -> None:
    head = HEADS[name]
    alpha = 0.5 if 0.5 in alphas_of(name) else 1.0  # embeddings have no labels
    examples = head.examples(1) * 4  # of one length: there is nothing to pad with

    def loss(**given: object) -> float:
        args = arguments(tmp_path, max_steps=1, logging_steps=1, alpha=alpha)
        trainer = DistillationTrainer(model=head.make(1), teacher_model=head.make(2), args=args, **given)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    expected = loss(train_dataset=examples, data_collator=head.collate)
    assert loss(train_dataset=datasets.Dataset.from_list(examples)) == pytest.approx(expected, rel=1e-6)
