"""Link: one student of a chain, what it is made by and trained with. What all links share is given to `Chain.run`."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import set_seed

from hf_distill.errors import HfDistillError, SettingError, did_you_mean
from hf_distill.objectives import Objective
from hf_distill.presets.base import Factory, Preset, Stage
from hf_distill.teachers.load import load_teacher
from hf_distill.trainer_parts.random_state import random_state_kept

TEACHERS = ("previous", "all")


@dataclass(frozen=True)
class Link:
    """One student of a chain.

    Args:
        name: of its folder, and in the report.
        model: the student, or a function that makes it: of nothing, or of its teacher (to begin as a part of it). A
            function is called when its turn comes, each link with a seed of its own.
        arguments: fields of `DistillationArguments`, over those of the run.
        objectives: as a `Stage` takes them. stages: a Preset or stages, in place of one training with `objectives`.
        keywords: keywords of the trainer, over those of the run.
        teacher: "previous": the student before, for the first link the teacher of the run. "all": an `Ensemble` of the
            teacher of the run and every student before (Son et al. 2021, Densely Guided Knowledge Distillation,
            section 3.2; there each is a term of its own, and some are dropped at random).

    Raises:
        SettingError: a name that is no folder's, objectives beside stages, no such teacher.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> Link("assistant", lambda: Bert(config), {"alpha": 0.9}).name
    'assistant'
    """

    name: str
    model: nn.Module | Callable[..., nn.Module] = field(repr=False)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    objectives: Factory | Sequence[Objective] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    stages: Preset | Sequence[Stage] = ()
    teacher: str = "previous"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise SettingError(f"link {self.name!r}: it names a folder. Use letters, digits, '_', '-' and '.' alone.")
        if not (isinstance(self.model, nn.Module) or callable(self.model)):
            raise SettingError(
                f"link {self.name!r}: model is a {type(self.model).__name__}. Give a model, or a function that makes "
                "it."
            )
        if self.stages and self.objectives:
            raise SettingError(f"link {self.name!r}: objectives beside stages. Give each Stage its objectives.")
        if self.teacher not in TEACHERS:
            hint = did_you_mean(self.teacher, TEACHERS)
            raise SettingError(
                f"link {self.name!r}: teacher={self.teacher!r}: allowed are {', '.join(TEACHERS)}.{hint}"
            )

    def make_stages(self) -> tuple[Stage, ...]:
        """Its trainings, with the link's arguments and keywords under their own."""
        given = self.stages.stages if isinstance(self.stages, Preset) else tuple(self.stages)
        return tuple(
            Stage(one.name, one.objectives, {**self.arguments, **one.arguments}, {**self.keywords, **one.keywords})
            for one in given or (Stage("training", self.objectives),)
        )

    def make_model(self, teacher: Any, *, teacher_kind: str | None, seed: int) -> Any:
        """The student; what it draws is of this seed alone, so that a resumed chain makes the same one.

        Args:
            teacher: a model or a folder, for a function that is of its teacher.
            teacher_kind: the head of the one in the folder; None: not known.
        """
        if isinstance(self.model, nn.Module):
            return self.model
        with random_state_kept():
            given = [_loaded(teacher, teacher_kind)] if _takes_teacher(self.model) else []
            set_seed(seed)
            made = self.model(*given)
        if not isinstance(made, nn.Module):
            raise SettingError(f"its function made a {type(made).__name__}. It must return the student, a model.")
        return made


@contextmanager
def named(link: Link) -> Iterator[None]:
    """What is refused says of which link."""
    try:
        yield
    except HfDistillError as error:
        raise type(error)(f"link {link.name!r}: {error}") from error


def _takes_teacher(make: Callable[..., Any]) -> bool:
    if isinstance(make, type):  # a class: its arguments are no teacher
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(make).parameters.values()
    return any(one.kind in kinds and one.default is inspect.Parameter.empty for one in parameters)


def _loaded(teacher: Any, kind: str | None) -> Any:
    if isinstance(teacher, nn.Module):
        return teacher
    if isinstance(teacher, (str, os.PathLike)) and kind is not None:
        return load_teacher(teacher, kind)
    raise SettingError(
        "its function makes the student of its teacher, and the teacher of the run is no model "
        f"({type(teacher).__name__}). Load it, and pass the model as teacher_model=."
    )
