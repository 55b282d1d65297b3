"""Writing the card: whole or not at all, and with the metadata of the old card."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from hf_distill.hub import card as card_module
from hf_distill.hub.card import BIBTEX, render_card, write_card
from hf_distill.hub.usage import POOLED
from hf_distill.objectives import HiddenMatch
from hf_distill.tasks import Embedding
from hf_distill.teachers import BaseModelTeacher, Ensemble, MovingAverage
from tests.heads import HEADS
from tests.hub.sample_facts import sample_facts
from tests.lora import with_lora
from tests.trainer.tiny import bert, make


def test_write_card(tmp_path) -> None:
    path = write_card(sample_facts(), tmp_path / "new" / "folder")
    assert path.read_text(encoding="utf-8") == render_card(sample_facts())
    assert os.listdir(path.parent) == ["README.md"]


@pytest.mark.parametrize("broken", ["render_card", "replace"])
def test_a_failed_write_leaves_the_old_card_and_nothing_else(tmp_path, monkeypatch, broken) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    (tmp_path / "README.md").write_text("mine")
    target = card_module if broken == "render_card" else card_module.os
    monkeypatch.setattr(target, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_card(sample_facts(), tmp_path)
    assert os.listdir(tmp_path) == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_metadata_of_the_user_is_kept(tmp_path) -> None:
    (tmp_path / "README.md").write_text(
        "---\ntags:\n- theirs\n- mine\n- base_model:adapter:/home/me/x\n- /home/me\n"
        "license: mit\nlanguage: de\n---\n\n# Theirs\n"
    )
    facts = sample_facts(license=None, languages=())
    data = ModelCard.load(write_card(facts, tmp_path)).data
    assert data.tags[-2:] == ["mine", "theirs"] and len(data.tags) == 6
    assert (data.license, data.language) == ("mit", ["de"])
    data = ModelCard.load(write_card(sample_facts(), tmp_path)).data
    assert (data.license, data.language, data.tags[-1]) == ("apache-2.0", ["en"], "theirs")


@pytest.mark.parametrize("old", ["no metadata", "---\n[: broken\n---\n", "---\n- a list\n---\n"])
def test_an_unreadable_old_card_is_replaced(tmp_path, old, caplog) -> None:
    (tmp_path / "README.md").write_text(old)
    write_card(sample_facts(), tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == render_card(sample_facts())
    assert ("is lost" in caplog.text) == (old != "no metadata")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (lambda: MovingAverage(decay=0.9), ["a moving average of the student itself (decay 0.9)"]),
        (BaseModelTeacher, ["the base model itself, its adapters switched off"]),
        (
            lambda: Ensemble([bert(seed=1), MovingAverage()], mean="logits", weights=[1, 3]),
            [
                "a moving average of the student itself (decay 0.999)",
                "the mean of their logits, weighted by 0.25, 0.75",
            ],
        ),
        (lambda: Ensemble([bert(seed=1), bert(seed=2)], weights="entropy"), ["probabilities, weighted by entropy"]),
    ],
)
def test_the_card_describes_teachers_that_are_not_models(tmp_path, teacher: Any, words: list[str]) -> None:
    made = teacher()
    student = with_lora(bert(), "query") if isinstance(made, BaseModelTeacher) else bert()
    make(tmp_path, student, made).create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    for part in words:
        assert part in card
    assert ("from a local model (" in card) == (isinstance(made, Ensemble))


@pytest.mark.parametrize("pooling", [None, "mean", "first", "last"])
def test_the_card_says_how_an_embedding_is_pooled(tmp_path, caplog, pooling: str | None) -> None:
    """The log says it too if the user did not choose."""
    head = HEADS["bert_embedding"]
    trainer = make(
        tmp_path,
        head.make(seed=0),
        head.make(seed=1),
        train_dataset=head.examples(4),
        data_collator=head.collate,
        task=None if pooling is None else Embedding(pooling),
        alpha=1.0,
    )
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Its embedding of an input is {POOLED[pooling or 'mean']}; the model itself does not pool." in card
    assert ("Embeddings are the mean of the last hidden states" in caplog.text) == (pooling is None)


@pytest.mark.parametrize(("labels", "problem"), [(1, "single_label"), ([1.0, 0.0, 1.0], "multi_label")])
def test_the_card_shows_the_problem_type_that_transformers_set(tmp_path, labels: Any, problem: str) -> None:
    student = bert()
    assert student.config.problem_type is None
    data = [{"input_ids": [1, 2, 3], "labels": labels}] * 4
    trainer = make(tmp_path, student, bert(seed=1), train_dataset=data, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| Problem type | `{problem}_classification` |" in card


def test_the_card_names_the_optimizer_and_the_schedule_that_the_user_passed(tmp_path) -> None:
    student = bert()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.125, weight_decay=0.25)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = make(tmp_path / "object", student, alpha=0.0, optimizers=(optimizer, schedule))
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "object" / "out" / "README.md").read_text(encoding="utf-8")
    for row in (
        "learning rate | 0.125",
        "learning rate schedule | ConstantLR",
        "optimizer | SGD",
        "weight decay | 0.25",
    ):
        assert f"| {row} |" in card, row
    trainer = make(tmp_path / "class", bert(), alpha=0.0, optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 0.5}))
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "class" / "out" / "README.md").read_text(encoding="utf-8")
    assert "| optimizer | Adagrad |" in card and "| learning rate | 0.5 |" in card


def test_the_card_cites_the_papers_that_teacher_and_objectives_state(tmp_path) -> None:
    class Mine(HiddenMatch):
        paper = "@misc{me2026, title = {Mine}}"

    trainer = make(tmp_path, bert(), MovingAverage(), objectives=Mine())
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert BIBTEX[MovingAverage.paper] in card and f"```bibtex\n{Mine.paper}\n```" in card
    assert BIBTEX[HiddenMatch.paper] not in card
