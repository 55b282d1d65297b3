"""Classes without a known task: at alpha=0 they train like `Trainer`; comparing with a teacher requires a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import transformers as tf
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_distill import DataError, DistillationArguments, DistillationTrainer, HiddenMatch, SettingError
from tests.trainer.refusals import refused
from tests.trainer.tiny import SIZE, arguments, assert_moved, bert, examples, make, padded, softened_kl, weights

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Plain(nn.Module):
    """`forward(x, labels)`, a dict, no config."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layer = nn.Linear(3, 2)
        self.dropout = nn.Dropout(0.3)

    def predicted(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(self.dropout(x))
        return found

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        found = {"logits": self.predicted(x)}
        return found if labels is None else {"loss": nn.functional.mse_loss(found["logits"], labels), **found}


class Tuple(Plain):
    """The same with tuple outputs."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return tuple(super().forward(x, labels).values())


class Target(Plain):
    """The same with labels named `target`."""

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> Any:
        return super().forward(x, target)


class Autoencoder(Plain):
    """Its loss needs no labels."""

    def forward(self, x: torch.Tensor) -> Any:
        found = self.predicted(x)
        return {"loss": (found.sum(-1) - x.sum(-1)).square().mean(), "logits": found}


class Stack(nn.Sequential):
    """A `Sequential` with a loss."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return {"loss": nn.functional.mse_loss(super().forward(x), labels)}


class CustomPreTrained(tf.PreTrainedModel):
    """A `PreTrainedModel` whose forward accepts any keyword, so that `Trainer` counts items for it."""

    config_class = tf.BertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layer = nn.Linear(3, 2)
        self.post_init()

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None, **more: Any) -> Any:
        found = self.layer(x)
        return {"loss": nn.functional.mse_loss(found, labels), "logits": found}


class SelfSupervised(tf.BertForMaskedLM):
    """Derived from a known head, with a loss that needs no labels."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        logits = super().forward(input_ids=input_ids, attention_mask=attention_mask).logits
        return {"loss": logits.square().mean(), "logits": logits}


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def vectors(**renamed: str | None) -> list[dict[str, Any]]:
    rng = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(3, generator=rng), "labels": torch.randn(2, generator=rng)} for _ in range(8)]
    names = {"labels": "labels", **renamed}
    return [{"x": row["x"], **({names["labels"]: row["labels"]} if names["labels"] else {})} for row in rows]


def ids(**more: Callable[[list[int], int], Any]) -> list[dict[str, Any]]:
    rows = [[1, 5, 6, 7, 8 + i] for i in range(8)]
    return [{"input_ids": row, **{name: of(row, i) for name, of in more.items()}} for i, row in enumerate(rows)]


@dataclass(frozen=True)
class Case:
    make: Callable[[], Any]
    data: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    task: str | None = None


def config(kind: Any, **more: Any) -> Any:
    return kind(**{**SIZE, "hidden_dropout_prob": 0.3, **more})


GPT2 = {"vocab_size": 23, "n_embd": 16, "n_layer": 1, "n_head": 2, "num_labels": 1}
TWICE = {
    "input_ids": lambda row, i: [row, row],
    "labels": lambda row, i: [row, row],
    "mc_token_ids": lambda row, i: [4, 4],
    "mc_labels": lambda row, i: i % 2,
}
CASES = {
    "module": Case(Plain, vectors()),
    "tuple": Case(Tuple, vectors()),
    "sequential": Case(lambda: seeded(lambda: Stack(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2))), vectors()),
    "home_made": Case(lambda: seeded(lambda: CustomPreTrained(config(tf.BertConfig))), vectors()),
    "target": Case(Target, vectors(labels="target"), {"label_names": ["target"]}),
    "target_with_a_task": Case(Target, vectors(labels="target"), {"label_names": ["target"]}, "regression"),
    "no_labels": Case(Autoencoder, vectors(labels=None)),
    "no_labels_by_name": Case(Autoencoder, vectors(labels=None), {"label_names": []}),
    "no_labels_with_a_task": Case(Autoencoder, vectors(labels=None), {"label_names": []}, "regression"),
    "self_supervised": Case(lambda: seeded(lambda: SelfSupervised(config(tf.BertConfig))), ids()),
    "bert_pretraining": Case(
        lambda: seeded(lambda: tf.BertForPreTraining(config(tf.BertConfig))),
        ids(labels=lambda row, i: row, next_sentence_label=lambda row, i: i % 2),
    ),
    "bert_next_sentence": Case(
        lambda: seeded(lambda: tf.BertForNextSentencePrediction(config(tf.BertConfig))),
        ids(labels=lambda row, i: i % 2),
    ),
    "gpt2_double_heads": Case(lambda: seeded(lambda: tf.GPT2DoubleHeadsModel(tf.GPT2Config(**GPT2))), ids(**TWICE)),
}


def script(folder: Path, case: Case, *, ours: bool, **settings: Any) -> tuple[Any, ...]:
    """Train, evaluate and predict; return the observable results."""
    kind, base = (DistillationArguments, DistillationTrainer) if ours else (TrainingArguments, Trainer)
    more = {"alpha": 0.0} if ours else {}
    args = arguments(folder, kind, logging_steps=1, eval_strategy="epoch", **case.settings, **settings, **more)
    student, given = case.make(), {"task": case.task} if ours and case.task else {}
    start = weights(student)
    trainer = base(model=student, args=args, train_dataset=case.data, eval_dataset=case.data[:5], **given)
    trainer.train()
    assert_moved(weights(student), start)
    keep = ("loss", "grad_norm", "eval_loss", "train_loss", "step", "epoch")
    logged = [{name: entry[name] for name in keep if name in entry} for entry in trainer.state.log_history]
    output = trainer.predict(case.data[:5])
    return weights(student), logged, output.predictions, output.metrics.get("test_loss")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_it_trains_evaluates_and_predicts_like_trainer(tmp_path, name: str, accumulation: int) -> None:
    """Bit for bit, with accumulation too: the steps are those of the base trainer."""
    case, cut = CASES[name], {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2}
    theirs = script(tmp_path / "a", case, ours=False, **cut)
    ours = script(tmp_path / "b", case, ours=True, **cut)
    if case.task is not None and accumulation > 1 and case.settings["label_names"]:
        for weight, expected in zip(ours[0].values(), theirs[0].values(), strict=True):  # equal up to rounding
            torch.testing.assert_close(weight, expected)
        return
    for found, expected in zip(ours, theirs, strict=True):
        assert repr(found) == repr(expected)
    assert all(torch.equal(ours[0][name], value) for name, value in theirs[0].items())


def test_without_a_task_the_loss_is_not_split_into_terms(tmp_path) -> None:
    logged = []
    for task in (None, "regression"):
        trainer = make(
            tmp_path, Plain(), alpha=0.0, task=task, train_dataset=vectors(), data_collator=None, logging_steps=1
        )
        trainer.train()
        logged.append(trainer.state.log_history[0])
    assert "loss/labels" not in logged[0]
    assert logged[1]["loss/labels"] == logged[1]["loss"] == logged[0]["loss"]


COMPARING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpha": ({"alpha": 0.5}, {}),
    "a_schedule": ({"alpha": 0.0, "alpha_schedule": "linear", "alpha_end": 0.1}, {}),
    "objectives": ({"alpha": 0.0}, {"objectives": HiddenMatch()}),
    "evaluation": ({"alpha": 0.0, "evaluate_with_teacher": True}, {}),
}


@pytest.mark.parametrize("name", COMPARING)
def test_comparing_with_a_teacher_requires_a_task(tmp_path, name: str) -> None:
    settings, given = COMPARING[name]
    words = ("Plain", "Supported kinds of head", 'task="classification"', "alpha=0")
    with refused(tmp_path, SettingError, *words):
        make(tmp_path, Plain(), Plain(1), train_dataset=vectors(), data_collator=None, **settings, **given)


def test_raising_alpha_in_a_callback_requires_a_task(tmp_path) -> None:
    class Raise(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            args.alpha = 0.5

    student = Plain()
    given = {"train_dataset": vectors(), "data_collator": None, "callbacks": [Raise()]}
    trainer = make(tmp_path, student, Plain(1), alpha=0.0, **given)
    with pytest.raises(SettingError, match="Plain: this library does not know where"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_search_over_alpha_requires_a_task(tmp_path) -> None:
    trainer = make(
        tmp_path,
        None,
        Plain(1),
        model_init=lambda: Plain(),
        alpha=0.0,
        train_dataset=vectors(),
        eval_dataset=vectors(),
        eval_strategy="steps",
        eval_steps=1,
        data_collator=None,
    )
    with pytest.raises(SettingError, match="Plain: this library does not know where"):
        trainer.hyperparameter_search(lambda trial: {"alpha": trial.suggest_float("alpha", 0.5, 0.5)}, n_trials=1)


def test_the_card_of_an_unknown_class(tmp_path) -> None:
    trainer = make(tmp_path, Plain(), alpha=0.0, train_dataset=vectors(), data_collator=None)
    trainer.train()
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "`Plain`" in card and "on the labels, without a teacher." in card


def test_a_known_head_without_labels_raises_with_the_cause(tmp_path) -> None:
    """The cause is `Trainer`'s own error (no loss); the message names the labels."""
    trainer = make(tmp_path, bert(), alpha=0.0, train_dataset=examples(labels=None))
    with pytest.raises(DataError, match="there is no labels in") as raised:
        trainer.train()
    assert "did not return a loss" in str(raised.value.__cause__)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_label_names_apply_to_the_task_too(tmp_path, alpha: float) -> None:
    """`label_names=["target"]` has its meaning from `Trainer`, and the task uses the same column."""

    class Classifier(Plain):
        def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> Any:
            logits = self.layer(x)
            return {"logits": logits} | (
                {} if target is None else {"loss": nn.functional.cross_entropy(logits, target)}
            )

    data = [{"x": row["x"], "target": i % 2 if i else -100} for i, row in enumerate(vectors())]
    student, teacher = Classifier(), Classifier(1)
    x, target = torch.stack([row["x"] for row in data]).double(), torch.tensor([row["target"] for row in data])
    with torch.no_grad():
        ours, theirs = (model.layer.weight.double() @ x.T for model in (student, teacher))
        ours, theirs = ours.T + student.layer.bias.double(), theirs.T + teacher.layer.bias.double()
    expected = (1 - alpha) * nn.functional.cross_entropy(ours[1:], target[1:]) + alpha * softened_kl(
        ours, theirs, 2.0
    ).mean()
    trainer = make(
        tmp_path,
        student,
        teacher,
        alpha=alpha,
        task="classification",
        label_names=["target"],
        label_matching="by_index",
        train_dataset=data,
        eval_dataset=data,
        data_collator=None,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,
        evaluate_with_teacher=True,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(nn.functional.cross_entropy(ours[1:], target[1:]).item(), rel=1e-5)
    assert metrics["eval_divergence"] == pytest.approx(softened_kl(ours, theirs, 2.0).mean().item(), rel=1e-5)


def test_a_teacher_column_named_in_the_students_forward_is_the_students(tmp_path) -> None:
    """The input `teacher_logits` of a custom distilling model reaches its collator and its forward."""

    class Distilling(Plain):
        def forward(self, x: torch.Tensor, teacher_logits: torch.Tensor) -> Any:
            found = self.layer(x)
            return {"loss": nn.functional.mse_loss(found, teacher_logits), "logits": found}

    data = [{"x": row["x"], "teacher_logits": row["labels"]} for row in vectors()]
    found = []
    for kind, base, more in (
        (TrainingArguments, Trainer, {}),
        (DistillationArguments, DistillationTrainer, {"alpha": 0.0}),
    ):
        student = Distilling()
        base(model=student, args=arguments(tmp_path, kind, **more), train_dataset=data).train()
        found.append(weights(student)["layer.weight"])
    assert torch.equal(*found)


def test_a_known_head_is_counted_exactly_at_alpha_0(tmp_path) -> None:
    """Under accumulation the update equals that of one batch, unlike `Trainer`'s (docs/heads.md)."""
    found = []
    for cut in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ):
        student = bert().double()
        make(tmp_path, student, alpha=0.0, max_steps=1, data_collator=padded, **cut).train()
        found.append(weights(student)["classifier.weight"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)
