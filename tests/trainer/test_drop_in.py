"""The same script with `Trainer` and with alpha=0: equal logs, weights, files and events.

Each scenario is a behaviour from transformers' own Trainer tests, run twice: with `Trainer`, and with
`DistillationTrainer(args=DistillationArguments(alpha=0))`. Only `loss/labels` is logged in addition.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from hf_distill import DistillationArguments, DistillationTrainer
from hf_distill.trainer.interruptions import SETTINGS as SETTINGS_FILE
from tests.heads import HEADS
from tests.trainer.tiny import arguments, assert_same_bits, bert, examples, padded, weights

optuna.logging.set_verbosity(optuna.logging.ERROR)
TIMES = ("runtime", "per_second", "preparation_time")


class Net(nn.Module):
    """A class that no library knows, without a config, with its own argument names. Its first layer has dropout."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        predicted = self.out(self.dropout(self.body(x)).tanh())
        found = {"logits": predicted}
        return found if labels is None else {"loss": nn.functional.mse_loss(predicted, labels), **found}


def points(count: int = 8, *, labelled: bool = True) -> list[dict[str, Any]]:
    made = [{"x": [math.sin(i), math.cos(2 * i), 0.1 * i], "labels": [0.3 * i, -0.2 * i]} for i in range(count)]
    return [{k: torch.tensor(v) for k, v in one.items() if labelled or k != "labels"} for one in made]


@dataclass(frozen=True)
class Student:
    """A student, and examples for it."""

    make: Callable[[], Any]
    examples: Callable[..., list[dict[str, Any]]]
    unlabelled: Callable[[int], list[dict[str, Any]]]
    collate: Any
    body: str


KNOWN = Student(lambda: bert(dropout=0.3), examples, lambda n: examples(n, labels=None), padded, "bert")
UNKNOWN = Student(Net, points, lambda n: points(n, labelled=False), None, "body")


@dataclass(frozen=True)
class Script:
    """One of the two ways to run a script."""

    ours: bool
    folder: Path
    student: Student

    def args(self, **settings: Any) -> Any:
        kind = DistillationArguments if self.ours else TrainingArguments
        given = {"learning_rate": 0.05, "optim": "adamw_torch", "max_grad_norm": 1.0, "logging_steps": 1, **settings}
        return arguments(self.folder, kind, **given, **({"alpha": 0.0} if self.ours else {}))

    def trainer(self, model: Any = None, **given: Any) -> Any:
        own = inspect.signature(Trainer.__init__).parameters
        keywords = {"train_dataset": self.student.examples(8), "data_collator": self.student.collate}
        keywords |= {name: given.pop(name) for name in list(given) if name in own and name != "args"}
        if "model_init" not in keywords:
            keywords["model"] = self.student.make() if model is None else model
        base = DistillationTrainer if self.ours else Trainer
        cls, args = given.pop("cls", lambda one: one)(base), given.pop("args", None)
        return cls(args=args if args is not None else self.args(**given), **keywords)

    @property
    def out(self) -> Path:
        return self.folder / "out"


def logs(trainer: Any) -> list[dict[str, Any]]:
    return [without_times(entry) for entry in trainer.state.log_history]


def without_times(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if not k.endswith(TIMES) and k != "loss/labels"}


def trained(trainer: Any, **keywords: Any) -> dict[str, Any]:
    """Train, and return the observable results."""
    output = trainer.train(**keywords)
    return {
        "weights": weights(trainer.model),
        "logs": logs(trainer),
        "step": output.global_step,
        "loss": output.training_loss,
        "epoch": trainer.state.epoch,
    }


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Assert bitwise equality in any containers; NaN equals NaN."""
    assert type(found) is type(expected), where
    if isinstance(found, Mapping):
        assert list(found) == list(expected), where
        for name in expected:
            assert_same(found[name], expected[name], f"{where}.{name}")
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{place}]")
    elif isinstance(found, (torch.Tensor, np.ndarray)):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), err_msg=where)
    elif isinstance(found, float) and math.isnan(found):
        assert math.isnan(expected), where
    else:
        assert found == expected, (where, found, expected)


Scenario = Callable[[Script], Any]
SCENARIOS: list[tuple[Scenario, Student]] = []


def scenario(*students: Student) -> Callable[[Scenario], Scenario]:
    def register(function: Scenario) -> Scenario:
        SCENARIOS.extend((function, student) for student in students or (KNOWN, UNKNOWN))
        return function

    return register


@pytest.mark.parametrize(
    ("run", "student"),
    SCENARIOS,
    ids=lambda one: {id(KNOWN): "known", id(UNKNOWN): "unknown"}.get(id(one)) or one.__name__,
)
def test_the_script_gives_the_same_results(tmp_path, run: Scenario, student: Student) -> None:
    theirs = run(Script(False, tmp_path / "a", student))
    assert_same(run(Script(True, tmp_path / "b", student)), theirs)
    assert theirs  # something was compared


# Training length and parameters.


@scenario()
def training_arguments_are_unchanged(script: Script) -> Any:
    args = script.args()
    before = args.to_dict()
    script.trainer(args=args).train()
    return {name: value == before[name] for name, value in args.to_dict().items() if hasattr(TrainingArguments, name)}


@scenario()
def steps_and_epochs_with_a_kept_or_dropped_last_batch(script: Script) -> Any:
    data = script.student.examples(10)
    kinds = [{"dataloader_drop_last": drop, "num_train_epochs": n} for drop, n in ((False, 1.5), (True, 1))]
    return [trained(script.trainer(train_dataset=data, max_steps=-1, **kind)) for kind in kinds]


@scenario(UNKNOWN)
def accumulation(script: Script) -> Any:
    """For an unknown class the base trainer does everything; known heads are made exact (docs/heads.md)."""
    data = script.student.examples(10)
    return trained(script.trainer(train_dataset=data, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2))


@scenario(KNOWN)
def steps_under_accumulation(script: Script) -> Any:
    data, cut = script.student.examples(10), {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    found = trained(script.trainer(train_dataset=data, max_steps=-1, num_train_epochs=2, **cut))
    rates = [{k: e[k] for k in ("learning_rate", "epoch", "step") if k in e} for e in found["logs"]]
    return found["step"], found["epoch"], rates


class Endless(torch.utils.data.IterableDataset):
    def __init__(self, data: list[Any], rounds: int) -> None:
        self.data, self.rounds = data, rounds

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.rounds):
            yield from self.data


@scenario()
def a_stream_for_max_steps_even_if_shorter(script: Script) -> Any:
    data = script.student.examples(8)
    return [trained(script.trainer(train_dataset=Endless(data, n), max_steps=3)) for n in (9, 1)]


@scenario()
def frozen_parameters_do_not_change(script: Script) -> Any:
    model = script.student.make()
    getattr(model, script.student.body).requires_grad_(False)
    return trained(script.trainer(model))


@scenario()
def clipping_and_the_logged_norm(script: Script) -> Any:
    return [trained(script.trainer(max_grad_norm=norm)) for norm in (0.0, 0.1)]


@scenario()
def a_custom_optimizer_and_scheduler(script: Script) -> Any:
    model = script.student.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    passed = trained(script.trainer(model, optimizers=(optimizer, scheduler)))
    by_class = trained(script.trainer(optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.2})))
    return passed, by_class


@scenario()
def a_scheduler_that_uses_the_metric(script: Script) -> Any:
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    more = {"metric_for_best_model": "loss", "lr_scheduler_kwargs": {"patience": 0}, "max_steps": 4}
    return trained(script.trainer(eval_dataset=script.student.examples(4), **settings, **more))


@scenario()
def model_init_trained_twice(script: Script) -> Any:
    trainer = script.trainer(model_init=script.student.make)
    return trained(trainer), trained(trainer)


@scenario()
def training_continued_after_the_end(script: Script) -> Any:
    trainer = script.trainer()
    return trained(trainer), trained(trainer)


@scenario(KNOWN)
def neftune(script: Script) -> Any:
    return trained(script.trainer(neftune_noise_alpha=3.0))


def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return outputs["logits"].square().sum() / (1 if num_items_in_batch is None else num_items_in_batch)


@scenario()
def a_custom_loss(script: Script) -> Any:
    return trained(script.trainer(compute_loss_func=summed))


class Hungry(Net):
    """Runs out of memory on batches larger than two."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        if len(x) > 2:
            raise RuntimeError("CUDA out of memory.")
        return super().forward(x, labels)


@scenario(UNKNOWN)
def auto_find_batch_size(script: Script) -> Any:
    trainer = script.trainer(Hungry(), auto_find_batch_size=True, per_device_train_batch_size=8)
    return trained(trainer), trainer._train_batch_size, trainer.state.train_batch_size


# Evaluation.


def mean_error(prediction: Any) -> dict[str, float]:
    return {"mean": float(np.asarray(prediction.predictions).mean()), "labels": float(prediction.label_ids.sum())}


@scenario()
def evaluation_and_prediction_with_labels_and_without(script: Script) -> Any:
    trainer = script.trainer(compute_metrics=mean_error, per_device_eval_batch_size=3)
    found = []
    for data in (script.student.examples(7), script.student.unlabelled(7)):
        output = trainer.predict(data)
        found.append((without_times(trainer.evaluate(data)), without_times(output.metrics), tuple(output[:2])))
    return found


@scenario()
def several_evaluation_datasets(script: Script) -> Any:
    datasets = {"one": script.student.examples(3), "two": script.student.examples(6)}
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_two_loss"}
    saved = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    trainer = script.trainer(eval_dataset=datasets, compute_metrics=mean_error, **settings, **saved)
    found = trained(trainer)
    return found, trainer.state.best_metric, without_times(trainer.evaluate()), without_times(trainer.evaluate("one"))


@scenario()
def evaluation_before_the_first_step_and_in_pieces(script: Script) -> Any:
    settings = {"eval_on_start": True, "eval_strategy": "epoch", "eval_accumulation_steps": 1}
    data = script.student.examples(5)
    return trained(script.trainer(eval_dataset=data, compute_metrics=mean_error, **settings))


@scenario(KNOWN)
def predictions_of_unequal_length_are_padded(script: Script) -> Any:
    """Token classification: each batch as long as its longest example, the array as long as the longest batch."""
    head = HEADS["bert_tokens"]
    trainer = script.trainer(head.make(), train_dataset=None, data_collator=head.collate, per_device_eval_batch_size=2)
    output = trainer.predict(head.examples(7))
    return output.predictions, output.label_ids, without_times(output.metrics)


class Tuples(Net):
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return tuple(super().forward(x, labels).values())


@scenario(UNKNOWN)
def tuple_outputs(script: Script) -> Any:
    trainer = script.trainer(Tuples(), compute_metrics=mean_error)
    found = trained(trainer)
    return found, without_times(trainer.evaluate(script.student.examples(5)))


# Logs.


class NanOnce(Net):
    """Its loss is NaN in one training forward, but its gradient is finite."""

    calls = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        found = super().forward(x, labels)
        self.calls += 1
        if "loss" in found and self.calls == 2:
            found["loss"] = found["loss"] + (torch.nan - found["loss"]).detach()
        return found


@scenario(UNKNOWN)
def a_nan_loss_in_the_log(script: Script) -> Any:
    kinds = ({"logging_nan_inf_filter": kept} for kept in (True, False))
    return [trained(script.trainer(NanOnce(), max_steps=4, logging_steps=2, **kind)) for kind in kinds]


@scenario()
def log_overridden_by_a_subclass(script: Script) -> Any:
    seen: list[dict[str, Any]] = []

    def with_own_log(base: type) -> type:
        class Mine(base):  # type: ignore[misc, valid-type]  # either of the two
            def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
                seen.append(without_times(logs))
                super().log({**logs, "mine": 1.0}, start_time)

        return Mine

    return trained(script.trainer(cls=with_own_log)), seen


@scenario()
def memory_metrics(script: Script) -> Any:
    trainer = script.trainer(skip_memory_metrics=False, eval_dataset=script.student.examples(3))
    names = sorted(trainer.train().metrics), sorted(trainer.evaluate())
    assert any("mem_cpu" in name for name in names[0])
    return names


@scenario(KNOWN)
def the_number_of_tokens_seen(script: Script) -> Any:
    trainer = script.trainer(include_num_input_tokens_seen="all")
    return trained(trainer), trainer.state.num_input_tokens_seen


# Callbacks.

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


class Recorder(TrainerCallback):
    """Records every event, and acts on some of them."""

    def __init__(self, act: Callable[[str, Any, Any], None] | None = None) -> None:
        self.events: list[str] = []
        for event in EVENTS:
            setattr(self, event, self._on(event, act))

    def _on(self, event: str, act: Any) -> Any:
        def happened(args: Any, state: Any, control: Any, **given: Any) -> None:
            self.events.append(f"{event} {state.global_step} {sorted(given)}")
            if act is not None:
                act(event, state, control)

        return happened


@scenario()
def events_and_their_order(script: Script) -> Any:
    recorder = Recorder()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "epoch", "gradient_accumulation_steps": 2}
    given = {"eval_dataset": script.student.examples(3), "callbacks": [recorder], "per_device_train_batch_size": 2}
    script.trainer(max_steps=3, **given, **settings).train()
    return recorder.events


@scenario()
def the_list_of_callbacks(script: Script) -> Any:
    trainer = script.trainer(callbacks=[Recorder()])
    at_first = [type(one).__name__ for one in trainer.callback_handler.callbacks]
    trainer.train()
    return at_first, [type(one).__name__ for one in trainer.callback_handler.callbacks]


@scenario()
def a_replaced_list_of_callbacks(script: Script) -> Any:
    trainer = script.trainer()
    trainer.callback_handler.callbacks = [one for one in trainer.callback_handler.callbacks if "Flow" in str(type(one))]
    return trained(trainer)


@scenario()
def callbacks_that_stop_an_epoch_or_the_training(script: Script) -> Any:
    def stop(flag: str, when: str) -> Any:
        def act(event: str, state: Any, control: Any) -> None:
            if event == when and state.global_step == 2:
                setattr(control, flag, True)

        return act

    found = []
    for flag in ("should_training_stop", "should_epoch_stop"):
        recorder = Recorder(stop(flag, "on_step_end"))
        found.append((trained(script.trainer(max_steps=4, callbacks=[recorder])), recorder.events))
    return found


@scenario()
def callbacks_that_request_logs_evaluations_and_checkpoints(script: Script) -> Any:
    def act(event: str, state: Any, control: Any) -> None:
        if event == "on_step_end" and state.global_step == 2:
            control.should_log = control.should_evaluate = control.should_save = True

    data = script.student.examples(3)
    found = trained(script.trainer(callbacks=[Recorder(act)], eval_dataset=data, logging_strategy="no", max_steps=4))
    return found, sorted(path.name for path in script.out.iterdir())


@scenario()
def early_stopping(script: Script) -> Any:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    more = {"load_best_model_at_end": True, "metric_for_best_model": "mean", "greater_is_better": True}
    given = {"eval_dataset": script.student.examples(4), "compute_metrics": mean_error}
    stops = [EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)]
    trainer = script.trainer(callbacks=stops, **given, **settings, **more)
    found = trained(trainer)
    assert found["step"] == 2
    return found, trainer.state.best_metric


class Counting(TrainerCallback, ExportableState):
    """Its count is stored in checkpoints."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"count": self.count}, "attributes": {}}


@scenario()
def callbacks_whose_state_is_resumed(script: Script) -> Any:
    settings = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": True}
    script.trainer(callbacks=[Counting()], **settings).train()
    again = script.trainer(callbacks=[Counting()], max_steps=3, **settings)
    again.train(resume_from_checkpoint=str(script.out / "checkpoint-1"))
    counts = [one.count for one in again.callback_handler.callbacks if isinstance(one, Counting)]
    assert counts == [3]
    return counts, sorted(again.state.stateful_callbacks)


# Checkpoints.

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


@scenario()
def a_resumed_run(script: Script) -> Any:
    whole = trained(script.trainer(**SAVED))
    other = Script(script.ours, script.folder / "again", script.student)
    resumed = trained(other.trainer(**SAVED), resume_from_checkpoint=str(script.out / "checkpoint-2"))
    assert_same_bits(resumed["weights"], whole["weights"])
    assert resumed["logs"][-2]["loss"] == whole["logs"][-2]["loss"]
    return whole, resumed


@scenario()
def resumed_without_an_optimizer(script: Script) -> Any:
    script.trainer(save_only_model=True, **SAVED).train()
    other = Script(script.ours, script.folder / "again", script.student)
    return trained(other.trainer(**SAVED), resume_from_checkpoint=str(script.out / "checkpoint-2"))


@scenario()
def rotated_checkpoints(script: Script) -> Any:
    settings = {**SAVED, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    trainer = script.trainer(eval_dataset=script.student.examples(4), load_best_model_at_end=True, **settings)
    found = trained(trainer)
    return found, sorted(path.name for path in script.out.iterdir()), Path(trainer.state.best_model_checkpoint).name


@scenario()
def the_best_model_by_a_metric(script: Script) -> Any:
    settings = {**SAVED, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    given = {"eval_dataset": script.student.examples(4), "compute_metrics": mean_error}
    trainer = script.trainer(**given, **settings, metric_for_best_model="mean", greater_is_better=False)
    return trained(trainer), trainer.state.best_metric, trainer.state.best_global_step


@scenario()
def saved_files(script: Script) -> Any:
    """File names in a checkpoint and after `save_model`; ours adds only its settings."""
    trainer = script.trainer(**{**SAVED, "max_steps": 1})
    trainer.train()
    trainer.save_model(str(script.folder / "model"))
    folders = script.out / "checkpoint-1", script.folder / "model"
    return [sorted(path.name for path in folder.iterdir() if path.name != SETTINGS_FILE) for folder in folders]


# Data and search.


@scenario()
def unused_columns(script: Script) -> Any:
    rows = script.student.examples(8)
    columns = {name: [np.asarray(row[name]).tolist() for row in rows] for name in rows[0]}
    data = Dataset.from_dict({**columns, "note": list("abcdefgh")})
    loader = script.trainer(train_dataset=data, eval_dataset=data).get_train_dataloader()
    found = trained(script.trainer(train_dataset=data, eval_dataset=data, eval_strategy="epoch"))
    return found, sorted(next(iter(loader)))


@scenario()
def hyperparameter_search(script: Script) -> Any:
    trainer = script.trainer(
        model_init=script.student.make,
        eval_dataset=script.student.examples(4),
        eval_strategy="steps",
        eval_steps=1,
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)},
        n_trials=2,
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=3),
    )
    return best.run_id, best.objective, best.hyperparameters


def test_all_control_flags_are_covered() -> None:
    """`callbacks_that_...` sets flags by name."""
    for flag in ("should_training_stop", "should_epoch_stop", "should_log", "should_evaluate", "should_save"):
        assert hasattr(TrainerControl(), flag)
