"""Hyperparameter search over the settings of a distillation: a default space, and a check of the names in it.

`settings.py` applies the settings of a trial.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from transformers import Trainer, TrainingArguments
from transformers.hyperparameter_search import default_hp_search_backend
from transformers.trainer_utils import HPSearchBackend, default_compute_objective

from hf_distill._types import Keywords
from hf_distill.blend import SETTING_ALIASES
from hf_distill.errors import SettingError, did_you_mean
from hf_distill.signals import Needs
from hf_distill.trainer.arguments import DistillationArguments
from hf_distill.trainer.columns import evaluated_by_name

if TYPE_CHECKING:
    from optuna import Trial

    from hf_distill.trainer.mixin import DistillationMixin

Space: TypeAlias = Callable[[Any], Keywords]  # of a trial of the backend
_SOME_TEMPERATURE = 1.2345  # a value that no cache is likely to be tied to


class _Range(NamedTuple):
    """A range from `low` to `high`, drawn uniformly or log-uniformly."""

    low: float
    high: float
    logarithmic: bool = False


def search_arguments(trainer: DistillationMixin, *positional: Any, **keywords: Any) -> inspect.BoundArguments:
    """Return the arguments of `Trainer.hyperparameter_search`, with the defaults of a distillation.

    Raises:
        SettingError: if the space has a name that is no setting; raised when it is first drawn from.
    """
    bound = inspect.signature(Trainer.hyperparameter_search).bind(trainer, *positional, **keywords)
    given = bound.arguments
    space = given.get("hp_space") or _default_space(trainer, given.get("backend"))
    if space is not None:
        given["hp_space"] = _checked(space, trainer.args)
    if given.get("compute_objective") is None:
        given["compute_objective"] = partial(_default_objective, trainer)
    return bound


def _default_objective(trainer: DistillationMixin, metrics: dict[str, float]) -> float:
    """Return transformers' default objective, leaving out the metrics of the teacher."""
    prefixes = ["eval", *(f"eval_{name}" for name in evaluated_by_name(trainer.eval_dataset))]
    of_teacher = tuple(f"{prefix}_{name}" for prefix in prefixes for name in ("divergence", "teacher_"))
    return float(default_compute_objective({k: v for k, v in metrics.items() if not k.startswith(of_teacher)}))


def _default_space(trainer: DistillationMixin, backend: str | HPSearchBackend | None) -> Space | None:
    """Return the default space, or None for transformers' own if no setting of the distillation can be searched."""
    ranges = {name: one for name, one in _ranges(trainer).items() if hasattr(trainer.args, name)}
    if not ranges:
        return None
    rate = trainer.args.learning_rate
    if rate > 0:
        ranges["learning_rate"] = _Range(rate / 10, rate * 10, logarithmic=True)
    return _SPACES[HPSearchBackend(default_hp_search_backend() if backend is None else backend)](ranges)


def _ranges(trainer: DistillationMixin) -> dict[str, _Range]:
    """Return the ranges of alpha and the temperature, as far as a search may choose them."""
    blending = trainer.distiller.blending
    found: dict[str, _Range] = {}
    if not trainer._blend_is_ours or trainer._teacher_setting is None or blending.alpha is None:
        return found
    start, end = blending.alpha(0.0), blending.alpha(1.0)
    if start == end < 1:  # at 1 the data need no labels
        found["alpha"] = _Range(0.0, 1.0)
    match = blending.logits_match
    constant = match.temperature(0.0) == match.temperature(1.0)
    if constant and match.divergence_for(trainer.distiller.task)[1].softens and not trainer.distiller.task.on_values:
        try:
            if trainer.distiller.teacher is not None:
                trainer.distiller.teacher.check(Needs(logits=True, temperature=_SOME_TEMPERATURE))
        except SettingError:  # a cache that is tied to one temperature
            return found
        found["temperature"] = _Range(1.0, 8.0, logarithmic=True)
    return found


def _checked(space: Space, args: TrainingArguments) -> Space:
    """Return the same space with a check of its names when it is first drawn from, before anything is trained."""

    def checked(trial: Trial | Keywords) -> Keywords:
        found = space(trial)
        values = found.get("parameters", found) if isinstance(found, Mapping) else ()  # a sweep of W&B has more
        for name in values:
            if hasattr(args, name):
                continue
            if name in DistillationArguments.__dataclass_fields__:
                hint = f" It is a setting of DistillationArguments, and args is a {type(args).__name__}."
            else:
                hint = did_you_mean(name, DistillationArguments.__dataclass_fields__, SETTING_ALIASES)
            raise SettingError(f"hp_space: there is no setting {name!r}.{hint}")
        return found

    return checked


def _for_optuna(ranges: Mapping[str, _Range]) -> Space:
    return lambda trial: {
        name: trial.suggest_float(name, one.low, one.high, log=one.logarithmic) for name, one in ranges.items()
    }


def _for_ray(ranges: Mapping[str, _Range]) -> Space:
    def space(trial: Trial | Keywords) -> Keywords:
        tune = importlib.import_module("ray.tune")  # Trainer has checked that it is installed
        drawn = {True: tune.loguniform, False: tune.uniform}
        return {name: drawn[one.logarithmic](one.low, one.high) for name, one in ranges.items()}

    return space


def _for_wandb(ranges: Mapping[str, _Range]) -> Space:
    drawn = {True: "log_uniform_values", False: "uniform"}
    return lambda trial: {
        "method": "random",
        "metric": {"name": "objective", "goal": "minimize"},
        "parameters": {
            name: {"distribution": drawn[one.logarithmic], "min": one.low, "max": one.high}
            for name, one in ranges.items()
        },
    }


_SPACES = {
    HPSearchBackend.OPTUNA: _for_optuna,
    HPSearchBackend.RAY: _for_ray,
    HPSearchBackend.WANDB: _for_wandb,
}
