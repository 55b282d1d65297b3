"""hyperparameter_search over the settings of a distillation, and model_init."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
import torch

from hf_distill import DistillationTrainer, Distiller, SettingError, TeacherError
from tests.trainer.tiny import arguments, bert, examples, make, padded, weights

optuna.logging.set_verbosity(optuna.logging.ERROR)


def new_student() -> Any:
    return bert()


class Recorded:
    """A teacher's and a student's makers that write down what each trial used."""

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
    """A search space that offers these (alpha, temperature) in turn."""

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
    assert len(recorded.students) == 4  # one for the trainer's making, one a trial
    assert best.hyperparameters["alpha"] in (0.0, 0.5, 1.0)
    updated = [weights(student)["classifier.weight"] for student in recorded.students[1:]]
    assert not torch.equal(updated[0], updated[1]) and not torch.equal(updated[1], updated[2])


def test_a_trial_is_the_run_with_its_values(tmp_path) -> None:
    """The student that a trial leaves is the one of a plain run with the same settings."""
    recorded = Recorded(tmp_path / "search")
    recorded.search(grid((0.7, 3.0)), 1)
    student = bert()
    make(tmp_path / "plain", student, bert(seed=1), alpha=0.7, temperature=3.0, max_steps=1).train()
    for name, value in weights(student).items():
        assert torch.equal(weights(recorded.students[-1])[name], value), name


def test_an_alpha_that_cannot_be_stops_the_search(tmp_path) -> None:
    recorded = Recorded(tmp_path)
    with pytest.raises(SettingError, match=r"alpha=1\.5: must lie in \[0, 1\]"):
        recorded.search(grid((1.5, 2.0)), 1)


def test_a_search_that_starts_from_alpha_zero_has_its_teacher(tmp_path) -> None:
    recorded = Recorded(tmp_path, alpha=0.0)
    recorded.search(grid((0.5, 2.0)), 1)
    assert recorded.used == [(0.5, 2.0)]


def test_a_distiller_of_ones_own_keeps_its_blend_in_a_search_over_something_else(tmp_path) -> None:
    """With `distiller=` the settings of the blend in `args` are not read."""
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


def test_model_init_makes_the_student_that_learns_from_the_teacher(tmp_path) -> None:
    expected = bert()
    make(tmp_path / "model", expected, bert(seed=1), alpha=0.5).train()
    trainer = make(tmp_path / "init", None, bert(seed=1), model_init=new_student, alpha=0.5)
    trainer.train()
    for name, value in weights(expected).items():
        assert torch.equal(weights(trainer.model)[name], value), name


def test_model_init_and_a_teacher_that_does_not_fit_leave_no_folder(tmp_path) -> None:
    teacher = bert("TokenClassification", seed=1)
    with pytest.raises(TeacherError, match="token_classification head"):
        make(tmp_path, None, teacher, model_init=new_student)
    assert not list(tmp_path.iterdir())
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
