"""Stage and Preset: what one training agrees about, and the trainings of a paper. The papers are in `papers.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_distill.errors import SettingError
from hf_distill.objectives import Objective

Factory = Callable[[], Sequence[Objective]]


@dataclass(frozen=True)
class Stage:
    """One training: what is agreed about, and what its arguments are.

    Args:
        name: of its folder. objectives: a function that makes them, or some that are copied for each run, so that two
            runs share nothing that is learned.
        arguments: fields of `DistillationArguments`, over those of the run.
        keywords: keywords of the trainer (`train_dataset`, ...), over those of the run.

    >>> Stage("logits", arguments={"alpha": 1.0}).make_objectives()
    []
    """

    name: str
    objectives: Factory | Sequence[Objective] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def make_objectives(self) -> list[Objective]:
        """New ones, each time."""
        return list(self.objectives() if callable(self.objectives) else copy.deepcopy(tuple(self.objectives)))


@dataclass(frozen=True)
class Preset:
    """What a paper trains with. A preset of one stage goes into one trainer, one of several into `train_in_stages`.

    Args:
        paper: with its section. stages: in order. differences: from the paper and from its code, a sentence each.

    Raises:
        SettingError: `objectives` or `arguments` of a preset with several stages.

    >>> preset = Preset("plain", "Hinton et al. 2015, section 2", (Stage("plain", arguments={"alpha": 0.9}),))
    >>> preset.arguments, preset.objectives
    ({'alpha': 0.9}, [])
    """

    name: str
    paper: str
    stages: tuple[Stage, ...]
    differences: tuple[str, ...] = ()

    @property
    def objectives(self) -> list[Objective]:
        """For a trainer's `objectives=`; new ones, each time."""
        return self._only_stage("objectives").make_objectives()

    @property
    def arguments(self) -> dict[str, Any]:
        """For `DistillationArguments`."""
        return dict(self._only_stage("arguments").arguments)

    def _only_stage(self, what: str) -> Stage:
        if len(self.stages) != 1:
            names = ", ".join(stage.name for stage in self.stages)
            raise SettingError(
                f"{self.name} has {len(self.stages)} stages ({names}), each with its own {what}. Run them with "
                f"train_in_stages({self.name}(), model=..., teacher_model=..., args=...), or take one: "
                f"{self.name}().stages[0].make_objectives()."
            )
        return self.stages[0]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.paper}"]
        for stage in self.stages:
            lines.append(f"  {stage.name}: {', '.join(f'{k}={v}' for k, v in stage.arguments.items())}")
            lines += [f"    {_weighed(one)}" for one in stage.make_objectives()]
        return "\n".join([*lines, *(f"  differs: {sentence}" for sentence in self.differences)])


def _weighed(objective: Objective) -> str:
    weight = objective.weight(0.0)
    return f"{objective!r}" if weight == 1 else f"{weight:.4g} × {objective!r}"
