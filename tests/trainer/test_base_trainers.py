"""`class Mine(DistillationMixin, BaseTrainer)` where the base prepares model, inputs, labels and loss itself.

A stand-in that behaves like TRL's `SFTTrainer`, which tests/trainer/test_trl.py runs if TRL is installed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_distill import BaseModelTeacher, DataError, DistillationMixin, HiddenMatch, SettingError, TeacherError
from hf_distill.trainer.arguments import DistillationSettings
from tests.heads import HEADS
from tests.tiny_tokenizers import tokenizer
from tests.trainer.steps import dropout_of
from tests.trainer.tiny import QUIET, softened_kl, weights

HEAD, T = HEADS["llama_causal_lm"], 2.0
TEXTS = [" ".join(f"w{1 + (7 * i + 3 * j) % 30}" for j in range(3 + i % 4)) for i in range(8)]


@dataclass
class OwnArguments(TrainingArguments):
    """Arguments of the base trainer, with a new setting and a new default."""

    prompt_tokens: int = field(default=1, metadata={"help": "how many tokens of a text are no answer"})
    learning_rate: float = field(default=0.123)


@dataclass
class Arguments(DistillationSettings, OwnArguments):
    """Both kinds of settings."""


class Preparing(Trainer):
    """Loads a model by path, adds adapters, tokenizes texts, makes labels, and computes its loss without logits.

    Its `compute_loss` makes the returned outputs in a second forward, without gradient.
    """

    def __init__(
        self, model: Any, args: Any = None, *, train_dataset: Any, adapters: Any = None, eval_dataset: Any = None,
        **keywords: Any,
    ) -> None:  # fmt: skip
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model)
        if adapters is not None:
            import peft

            model = peft.get_peft_model(model, adapters)
        self.calls = 0
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        prepared = {name: one if one is None else self.prepared(one, args) for name, one in data.items()}
        super().__init__(model, args, data_collator=self.collate, **prepared, **keywords)
        self.model_accepts_loss_kwargs = False
        len(self.get_train_dataloader())  # as some trainers do, to compute the number of steps

    @staticmethod
    def prepared(data: Dataset, args: Any) -> Dataset:
        def tokenised(row: Mapping[str, Any]) -> dict[str, Any]:
            ids = tokenizer()(row["text"])["input_ids"]
            return {"input_ids": ids, "labels": [-100] * args.prompt_tokens + ids[args.prompt_tokens :]}

        return data.map(tokenised) if "text" in data.column_names else data

    @staticmethod
    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(feature["input_ids"]) for feature in features)
        fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        rows = [{**feature, "attention_mask": [1] * len(feature["input_ids"])} for feature in features]
        names = [name for name in fill if name in rows[0]]
        return {
            name: torch.tensor([row[name] + [fill[name]] * (longest - len(row[name])) for row in rows])
            for name in names
        }

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["input_ids", "labels"]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.calls += 1
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**inputs)


class Mine(DistillationMixin, Preparing):
    """The class that a user writes."""


class LogitFree(Preparing):
    """Returns the outputs of one forward, with gradient but without logits."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        return (loss, CausalLMOutputWithPast(loss=loss)) if return_outputs else loss


class MineLogitFree(DistillationMixin, LogitFree):
    """Distillation on top of it."""


def texts() -> Dataset:
    return Dataset.from_dict({"text": TEXTS})


def args(folder: Any, kind: Any = Arguments, **changed: Any) -> Any:
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1}
    settings = {"max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1, **QUIET, **plain, **changed}
    return kind(output_dir=str(Path(folder) / "out"), **settings)


def student(**settings: Any) -> Any:
    return HEAD.make(1, **settings)


def mine(folder: Any, *, cls: Any = Mine, double: bool = True, **given: Any) -> Any:
    own = ("model", "teacher_model", "train_dataset", "eval_dataset", "adapters", "objectives", "techer_model")
    keywords = {"model": student(), "teacher_model": HEAD.make(2), "train_dataset": texts()}
    keywords |= {name: given.pop(name) for name in own if name in given}
    if double:
        keywords["model"], keywords["teacher_model"] = keywords["model"].double(), keywords["teacher_model"].double()
    return cls(args=given.pop("args", None) or args(folder, **given), **keywords)


def by_hand(alpha: float, prompt: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and weights after one step, text by text, unpadded, in fp64."""
    ours, theirs = HEAD.make(1).double(), HEAD.make(2).double().eval()
    own, apart = [], []
    for text in TEXTS:
        ids = torch.tensor(tokenizer()(text)["input_ids"])
        answer = slice(prompt - 1, len(ids) - 1)
        logits, expected = ours(ids[None]).logits[0, answer], theirs(ids[None]).logits[0, answer].detach()
        own.append(torch.nn.functional.cross_entropy(logits, ids[prompt:], reduction="none"))
        apart.append(softened_kl(logits, expected, T))
    loss = (1 - alpha) * torch.cat(own).mean() + alpha * torch.cat(apart).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter -= 0.1 * parameter.grad
    return loss.item(), weights(ours)


CUTS = ({"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cut", CUTS, ids=["whole", "accumulated"])
@pytest.mark.parametrize("cls", [Mine, MineLogitFree])
def test_the_step_equals_the_one_by_hand(tmp_path, cls: Any, cut: dict[str, int], alpha: float) -> None:
    """The base makes the labels; the divergence's gradient reaches the student though the base's outputs have none."""
    trainer = mine(tmp_path, cls=cls, alpha=alpha, temperature=T, prompt_tokens=2, **cut)
    trainer.train()
    loss, expected = by_hand(alpha, prompt=2)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    for name, value in weights(trainer.model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)


def test_compute_loss_is_called_once_per_micro_batch(tmp_path) -> None:
    """Even for the first, which shows whether its outputs can be used: its metrics must not count twice."""
    trainer = mine(tmp_path, max_steps=3)
    trainer.train()
    assert trainer.calls == 3


def test_alpha_0_equals_the_base_trainer(tmp_path) -> None:
    """Bit for bit, with dropout, from which the second forward of the base also draws."""
    found = []
    for cls, more in ((Preparing, {}), (Mine, {"alpha": 0.0})):
        model = student(**dropout_of(HEAD, 0.3))
        kind = Arguments if more else OwnArguments
        given = {"train_dataset": texts(), "eval_dataset": texts()}
        trainer = cls(model, args(tmp_path, kind, max_steps=4, per_device_train_batch_size=4, **more), **given)
        trainer.train()
        metrics = trainer.evaluate()
        found.append((weights(model), [entry.get("loss") for entry in trainer.state.log_history], metrics["eval_loss"]))
    assert all(torch.equal(found[0][0][name], value) for name, value in found[1][0].items())
    assert found[0][1:] == found[1][1:]


def test_a_resumed_run_equals_the_uninterrupted_run(tmp_path) -> None:
    """With dropout: the trial of the base's outputs does not change the random state."""
    run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "double": False}
    whole = mine(tmp_path / "a", model=student(**dropout_of(HEAD, 0.3)), **run)
    whole.train()
    resumed = mine(tmp_path / "b", model=student(**dropout_of(HEAD, 0.3)), **run)
    resumed.train(resume_from_checkpoint=os.path.join(whole.args.output_dir, "checkpoint-2"))
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(resumed.model)[name], value), name


def test_objectives_on_activations_over_a_base_trainer(tmp_path) -> None:
    """Captured in the student's own forward, not in the one without gradient; equal to a plain `Trainer`."""
    found = []
    for cls in (Mine, type("OverTrainer", (DistillationMixin, Trainer), {})):
        given = {"train_dataset": Preparing.prepared(texts(), args(tmp_path)).remove_columns("text")}
        model = student().double()
        more = {} if cls is Mine else {"data_collator": Preparing.collate}
        trainer = cls(
            model=model, teacher_model=HEAD.make(2).double(), args=args(tmp_path), objectives=HiddenMatch("last"),
            **given, **more,
        )  # fmt: skip
        trainer.train()
        found.append((weights(model), trainer.state.log_history[0]["loss/hidden"]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    for name, value in found[1][0].items():
        torch.testing.assert_close(found[0][0][name], value, rtol=1e-5, atol=1e-7)


def test_evaluation_with_the_teacher_over_a_base_trainer(tmp_path) -> None:
    trainer = mine(tmp_path, eval_dataset=texts(), evaluate_with_teacher=True, alpha=1.0, temperature=T)
    assert trainer.evaluate()["eval_divergence"] == pytest.approx(by_hand(1.0)[0], rel=1e-5)


def test_a_model_loaded_by_the_base(tmp_path) -> None:
    student().save_pretrained(tmp_path / "model")
    trainer = mine(tmp_path, model=str(tmp_path / "model"), double=False, alpha=1.0, temperature=T)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(by_hand(1.0)[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapters_added_by_the_base(tmp_path) -> None:
    """The teacher is their base model, which exists only after the base has added them."""
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    given = {"adapters": adapters, "teacher_model": BaseModelTeacher(), "double": False}
    trainer = mine(tmp_path, max_steps=2, **given)
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss/logits"] == pytest.approx(0, abs=1e-6) and second["loss/logits"] > 1e-7


def test_defaults_of_the_base_arguments_are_kept(tmp_path) -> None:
    made = Arguments(output_dir=str(tmp_path), alpha=0.25, **QUIET)
    assert (made.learning_rate, made.prompt_tokens, made.alpha, made.temperature) == (0.123, 1, 0.25, 2.0)
    with pytest.raises(SettingError, match="alpha=7"):
        Arguments(output_dir=str(tmp_path), alpha=7.0, **QUIET)


def test_plain_base_arguments_use_the_defaults(tmp_path) -> None:
    own = args(tmp_path, OwnArguments)
    assert mine(tmp_path, args=own).distiller.blending.alpha(0.0) == 0.5


def test_missing_labels_of_the_base_are_found_at_the_first_batch(tmp_path) -> None:
    data = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 8})
    trainer = mine(tmp_path, train_dataset=data)
    with pytest.raises(DataError, match="there is no labels in"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_incompatible_teacher_leaves_nothing_behind(tmp_path) -> None:
    with pytest.raises(TeacherError, match="head"):
        mine(tmp_path, teacher_model=HEADS["bert_tokens"].make(1))
    assert not list(tmp_path.iterdir())


def test_unknown_keywords_give_a_suggestion(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'techer_model'\. Did you mean 'teacher_model'\?"):
        mine(tmp_path, techer_model=HEAD.make(2))
    with pytest.raises(TypeError, match=r"'temperature'.*is a setting: pass args=.*DistillationSettings"):
        Mine(model=student(), args=args(tmp_path), train_dataset=texts(), temperature=2.0)


class Scaled(Preparing):
    """Declares that `Trainer` has to divide its loss."""

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        super().__init__(*positional, **keywords)
        self.loss_is_scaled_for_ga = False


def test_the_loss_scaling_of_the_base_does_not_apply(tmp_path) -> None:
    trainer = mine(
        tmp_path, cls=type("MineScaled", (DistillationMixin, Scaled), {}), alpha=0.5, temperature=T, **CUTS[1]
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(by_hand(0.5)[0], rel=1e-5)
