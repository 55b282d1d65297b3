"""hyperparameter_search over distillation settings, and model_init."""

from __future__ import annotations

import sys
import types
from typing import Any

import optuna
import pytest
import torch
from transformers import TrainingArguments

from hf_distill import DistillationTrainer, Distiller, HiddenMatch, SettingError, TeacherCache, TeacherError
from hf_distill.teachers.cache import TopK
from hf_distill.trainer.search import _default_space
from tests.heads import HEADS
from tests.trainer.tiny import arguments, bert, examples, make, padded, weights

optuna.logging.set_verbosity(optuna.logging.ERROR)


def new_student() -> Any:
    return bert()


class Recorded:
    """Makes teacher and students, and records the values of each trial."""

    def __init__(self, folder: Any, **settings: Any) -> None:
        self.students: list[Any] = []
        self.settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "logging_steps": 1, **settings}
        self.teacher = bert(seed=1)
        self.trainer = DistillationTrainer(
            model_init=self.fresh,
            teacher_model=self.teacher,
            args=arguments(folder, **self.settings),
            train_dataset=examples(),
            eval_dataset=examples(4),
            data_collator=padded,
        )
        self.used: list[tuple[float, float]] = []

    def fresh(self) -> Any:
        self.students.append(bert())
        return self.students[-1]

    def objective(self, _: dict[str, float]) -> float:
        distiller = self.trainer.distiller
        self.used.append((distiller.blending.alpha(0.0), distiller.logits_match.temperature(0.0)))
        logged = [entry for entry in self.trainer.state.log_history if "loss" in entry][-1]
        self.logged = logged
        return float(logged["loss"])

    def search(self, space: Any, trials: int) -> Any:
        return self.trainer.hyperparameter_search(
            hp_space=space, compute_objective=self.objective, n_trials=trials, backend="optuna", direction="minimize"
        )


def grid(*points: tuple[float, float]) -> Any:
    """Return a search space that offers these (alpha, temperature) in turn."""

    def space(trial: optuna.Trial) -> dict[str, float]:
        alpha, temperature = points[trial.number]
        return {
            "alpha": trial.suggest_float("alpha", alpha, alpha),
            "temperature": trial.suggest_float("temperature", temperature, temperature),
        }

    return space


def test_each_trial_uses_its_own_values_and_a_new_student(tmp_path) -> None:
    recorded = Recorded(tmp_path)
    points = ((0.0, 1.0), (0.5, 2.0), (1.0, 4.0))
    best = recorded.search(grid(*points), 3)
    assert recorded.used == list(points)
    assert len(recorded.students) == 4  # one at construction, one per trial
    assert best.hyperparameters["alpha"] in (0.0, 0.5, 1.0)
    updated = [weights(student)["classifier.weight"] for student in recorded.students[1:]]
    assert not torch.equal(updated[0], updated[1]) and not torch.equal(updated[1], updated[2])


def test_a_trial_equals_a_run_with_its_values(tmp_path) -> None:
    """Its student equals that of a plain run with the same settings."""
    recorded = Recorded(tmp_path / "search")
    recorded.search(grid((0.7, 3.0)), 1)
    student = bert()
    make(tmp_path / "plain", student, bert(seed=1), alpha=0.7, temperature=3.0, max_steps=1).train()
    for name, value in weights(student).items():
        assert torch.equal(weights(recorded.students[-1])[name], value), name


def test_an_invalid_alpha_stops_the_search(tmp_path) -> None:
    recorded = Recorded(tmp_path)
    with pytest.raises(SettingError, match=r"alpha=1\.5: must lie in \[0, 1\]"):
        recorded.search(grid((1.5, 2.0)), 1)


def test_a_search_from_alpha_zero_loads_the_teacher(tmp_path) -> None:
    recorded = Recorded(tmp_path, alpha=0.0)
    recorded.search(grid((0.5, 2.0)), 1)
    assert recorded.used == [(0.5, 2.0)]


def test_a_passed_distiller_keeps_its_settings_in_a_search(tmp_path) -> None:
    """With `distiller=` the distillation settings in `args` are not used."""
    trainer = DistillationTrainer(
        model_init=new_student,
        distiller=Distiller(bert(), bert(seed=1), alpha=0.9, temperature=5.0, divergence="reverse_kl"),
        args=arguments(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1),
        train_dataset=examples(),
        eval_dataset=examples(4),
        data_collator=padded,
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.1, 0.1)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=1,
        backend="optuna",
    )
    assert trainer.distiller.blending.alpha(0.0) == 0.9
    assert trainer.distiller.logits_match.temperature(0.0) == 5.0
    assert trainer.distiller.logits_match.name_for(trainer.distiller.task) == "reverse_kl"


def test_a_student_from_model_init_learns_from_the_teacher(tmp_path) -> None:
    expected = bert()
    make(tmp_path / "model", expected, bert(seed=1), alpha=0.5).train()
    trainer = make(tmp_path / "init", None, bert(seed=1), model_init=new_student, alpha=0.5)
    trainer.train()
    for name, value in weights(expected).items():
        assert torch.equal(weights(trainer.model)[name], value), name


def test_model_init_with_an_incompatible_teacher_leaves_no_folder(tmp_path) -> None:
    teacher = bert("TokenClassification", seed=1)
    with pytest.raises(TeacherError, match="token_classification head"):
        make(tmp_path, None, teacher, model_init=new_student)
    assert not list(tmp_path.iterdir())
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())


# The default search space.


def searching(folder: Any, **changed: Any) -> DistillationTrainer:
    given = {"model_init": new_student, "eval_dataset": examples(4), "learning_rate": 0.01, "max_steps": 1}
    settings = {"eval_strategy": "steps", "eval_steps": 1, **given, **changed}
    return make(folder, None, settings.pop("teacher_model", bert(seed=1)), **settings)


def searched(trainer: Any, trials: int = 1, **given: Any) -> Any:
    sampler = optuna.samplers.RandomSampler(seed=0)
    return trainer.hyperparameter_search(n_trials=trials, backend="optuna", sampler=sampler, **given)


OF_A_DISTILLATION = {"alpha", "temperature", "learning_rate"}
SPACES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a distillation": ({}, OF_A_DISTILLATION),
    "whole numbers": ({"alpha": 0, "temperature": 2}, OF_A_DISTILLATION),
    "no labels needed": ({"alpha": 1.0}, {"temperature", "learning_rate"}),
    "schedules": (
        {"alpha_schedule": "linear", "alpha_end": 0.9, "temperature_schedule": "linear", "temperature_end": 1.0},
        set(),
    ),
    "no temperature in it": ({"divergence": "mean_squared_error"}, {"alpha", "learning_rate"}),
    "objectives alone": ({"alpha": None, "objectives": HiddenMatch("last")}, set()),
    "no teacher": ({"alpha": 0.0, "teacher_model": None}, set()),
}


@pytest.mark.parametrize("name", SPACES)
def test_the_default_search_space(tmp_path, name: str) -> None:
    settings, expected = SPACES[name]
    found = set(searched(searching(tmp_path, **settings)).hyperparameters)
    of_transformers = {"learning_rate", "num_train_epochs", "seed", "per_device_train_batch_size"}
    assert found == (expected or of_transformers)


def test_ranges_of_the_default_space_and_values_of_a_trial(tmp_path) -> None:
    """Integer arguments do not turn the drawn values into integers."""
    trainer = searching(tmp_path, alpha=0, temperature=2)
    used: list[dict[str, float]] = []

    def objective(metrics: dict[str, float]) -> float:
        distiller, args = trainer.distiller, trainer.args
        used.append(
            {
                "alpha": distiller.blending.alpha(0.0),
                "temperature": distiller.logits_match.temperature(0.0),
                "learning_rate": args.learning_rate,
            }
        )
        return metrics["eval_loss"]

    best = searched(trainer, 4, compute_objective=objective)
    assert best.hyperparameters in used and len({one["alpha"] for one in used}) == 4
    for one in used:
        assert 0 <= one["alpha"] <= 1 and 1 <= one["temperature"] <= 8 and 0.001 <= one["learning_rate"] <= 0.1
        assert one["temperature"] != round(one["temperature"])


def test_the_temperature_of_a_sparse_cache_is_not_searched(tmp_path) -> None:
    head = HEADS["llama_causal_lm"]
    given = {"data_collator": head.collate, "progress": False}
    for number, (store, expected) in enumerate(((TopK(2, temperatures=(2.0,)), set()), (None, {"temperature"}))):
        cache = TeacherCache.build(head.make(1), head.examples(8), tmp_path / str(number), store=store, **given)
        data = {"train_dataset": head.examples(8), "eval_dataset": head.examples(2), "data_collator": head.collate}
        trainer = searching(tmp_path, model_init=lambda: head.make(0), teacher_model=cache, **data)
        assert set(searched(trainer).hyperparameters) == {"alpha", "learning_rate"} | expected


def test_plain_training_arguments_search_no_distillation_settings(tmp_path) -> None:
    args = arguments(tmp_path, TrainingArguments, max_steps=1, eval_strategy="steps", eval_steps=1)
    assert "alpha" not in searched(searching(tmp_path, args=args)).hyperparameters


def test_teacher_metrics_are_not_part_of_the_objective(tmp_path) -> None:
    found = []
    for ask in (False, True):
        trainer = searching(tmp_path, evaluate_with_teacher=ask, compute_metrics=lambda prediction: {"mine": 3.0})
        found.append(searched(trainer).objective)
    assert found == [3.0, 3.0]


def test_default_spaces_of_other_backends(tmp_path, monkeypatch) -> None:
    """Neither is installed here: Ray's functions are replaced by stand-ins, and W&B's space is a dict."""
    trainer = searching(tmp_path)
    wandb = _default_space(trainer, "wandb")(None)
    assert wandb["method"] == "random" and set(wandb["metric"]) == {"name", "goal"}
    assert wandb["parameters"] == {
        "alpha": {"distribution": "uniform", "min": 0.0, "max": 1.0},
        "temperature": {"distribution": "log_uniform_values", "min": 1.0, "max": 8.0},
        "learning_rate": {"distribution": "log_uniform_values", "min": 0.001, "max": 0.1},
    }
    tune = types.SimpleNamespace(loguniform=lambda *ends: ("log", *ends), uniform=lambda *ends: ("even", *ends))
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.tune", tune)
    assert _default_space(trainer, "ray")(None) == {
        "alpha": ("even", 0.0, 1.0),
        "temperature": ("log", 1.0, 8.0),
        "learning_rate": ("log", 0.001, 0.1),
    }


# Names in a search space.


def one(name: str, value: float = 0.5) -> Any:
    return lambda trial: {name: trial.suggest_float(name, value, value)}


NAMES = {
    "temprature": r"hp_space: there is no setting 'temprature'\. Did you mean 'temperature'\?",
    "kd_alpha": r"there is no setting 'kd_alpha'\. Did you mean 'alpha'\?",
    "learning_rte": r"Did you mean 'learning_rate'\?",
    "zzz": r"there is no setting 'zzz'\.$",
}


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_setting_stops_the_search_before_training(tmp_path, name: str) -> None:
    trainer = searching(tmp_path)
    with pytest.raises(SettingError, match=NAMES[name]):
        searched(trainer, hp_space=one(name))
    assert trainer.state.global_step == 0


def test_a_distillation_setting_with_plain_arguments_raises(tmp_path) -> None:
    args = arguments(tmp_path, TrainingArguments, max_steps=1, eval_strategy="steps", eval_steps=1)
    with pytest.raises(SettingError, match="It is a setting of DistillationArguments, and args is a TrainingArguments"):
        searched(searching(tmp_path, args=args), hp_space=one("alpha"))


def test_a_setting_that_a_trial_cannot_change_raises(tmp_path) -> None:
    with pytest.raises(SettingError, match=r"args\.label_matching was 'by_name' and is now 'by_index'"):
        searched(
            searching(tmp_path),
            hp_space=lambda trial: {"label_matching": trial.suggest_categorical("label_matching", ["by_index"])},
        )


def test_searching_alpha_of_a_passed_distiller_raises(tmp_path) -> None:
    trainer = searching(tmp_path, teacher_model=None, distiller=Distiller(bert(), bert(seed=1)))
    with pytest.raises(SettingError, match=r"args\.alpha was 0\.5 and is now 0\.75.*set_blend"):
        searched(trainer, hp_space=one("alpha", 0.75))
