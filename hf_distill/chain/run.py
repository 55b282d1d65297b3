"""Chain: links one after another, each student the next one's teacher. How one link trains is the stages' business."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from torch import nn

from hf_distill.chain import record
from hf_distill.chain.link import Link, named
from hf_distill.chain.planning import Planned, planned, validation_of
from hf_distill.chain.result import INTERRUPTED, NO_EVALUATION, ChainResult, LinkResult, best_of
from hf_distill.compare.files import write_text_whole
from hf_distill.compare.size import parameter_count
from hf_distill.errors import SettingError, did_you_mean
from hf_distill.objectives import Objective
from hf_distill.presets.base import Factory
from hf_distill.stages import StagesResult, train_in_stages
from hf_distill.teachers import Ensemble
from hf_distill.trainer import DistillationMixin, DistillationTrainer
from hf_distill.trainer_parts.student_files import copied

KEEP = ("best", "last")
REPORT, REPORT_JSON = "report.md", "report.json"


class Chain:
    """Students of which each teaches the next: teacher assistants, progressive distillation, generations.

    Teacher assistants: Mirzadeh et al. 2020, Improved Knowledge Distillation via Teacher Assistant, section 3.

    Args:
        links: in order. keep: whose student is put into the output folder. "best": of those no larger than the last,
            the one with the best validation (a larger assistant is no answer to the wish for a small student); it is
            said where a larger one was better. "last": the last, whatever its validation.

    Raises:
        SettingError: no links, two of one name, one model in two links, no such keep.

    >>> import tempfile
    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill.arguments import DistillationArguments
    >>> def bert(layers):
    ...     size = {"vocab_size": 9, "hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 4}
    ...     return Bert(BertConfig(num_hidden_layers=layers, **size))
    >>> data = [{"input_ids": [1, 2], "labels": 0}, {"input_ids": [3, 4], "labels": 1}]
    >>> args = DistillationArguments(
    ...     tempfile.mkdtemp(), max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
    ... )
    >>> chain = Chain([Link("assistant", lambda: bert(2)), Link("student", lambda: bert(1))])
    >>> result = chain.run(teacher_model=bert(3), args=args, train_dataset=data, eval_dataset=data)
    {'train_runtime': ...
    >>> [(one.name, one.teacher) for one in result.links], result.kept
    ([('assistant', 'BertForSequenceClassification'), ('student', 'assistant')], 'student')
    """

    def __init__(self, links: Sequence[Link], *, keep: str = "best") -> None:
        self.links, self.keep = tuple(links), keep
        if not self.links or not all(isinstance(one, Link) for one in self.links):
            raise SettingError("Chain: give at least one Link(name, model=..., arguments=...), in a list.")
        names = [one.name for one in self.links]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SettingError(f"two links are called {twice[0]!r}; the links are {', '.join(names)}. Rename one.")
        models = [id(one.model) for one in self.links if isinstance(one.model, nn.Module)]
        if keep not in KEEP:
            raise SettingError(f"Chain: keep={keep!r}: allowed are {', '.join(KEEP)}.{did_you_mean(keep, KEEP)}")
        if len(set(models)) != len(models):
            raise SettingError("Chain: one model stands in two links. Each needs a student of its own.")

    @classmethod
    def generations(
        cls,
        make_model: Callable[..., Any],
        n: int,
        *,
        arguments: Mapping[str, Any] | None = None,
        objectives: Factory | Sequence[Objective] = (),
        keep: str = "best",
    ) -> Chain:
        """The same architecture again and again, each born from the one before; `result.ensemble()` has them all.

        Furlanello et al. 2018, Born-Again Neural Networks, section 3.

        Args:
            make_model: a function that makes a new student; called with another seed for each generation.
            n: how many.

        Raises:
            SettingError: fewer than one, or a model in place of a function.

        >>> [one.name for one in Chain.generations(lambda: None, 2).links]
        ['generation-1', 'generation-2']
        """
        if not isinstance(n, int) or n < 1:
            raise SettingError(f"Chain.generations: n={n!r}: must be a whole number, at least 1.")
        if isinstance(make_model, nn.Module):
            raise SettingError("Chain.generations: make_model is a model. Give a function that makes one: lambda: ...")
        arguments = dict(arguments or {})
        made = [Link(f"generation-{i}", make_model, arguments, objectives) for i in range(1, n + 1)]
        return cls(made, keep=keep)

    def run(
        self,
        *,
        teacher_model: Any,
        args: Any,
        trainer_class: type[DistillationMixin] = DistillationTrainer,
        resume_from_checkpoint: bool = False,
        **keywords: Any,
    ) -> ChainResult:
        """Train the links in order. `<output_dir>/1-<name>`, `2-<name>`, ... hold a student each.

        The next link reads its teacher from that folder, so that a chain that was interrupted ends as one that was not.
        `output_dir` gets the student that is kept, `report.md` and `report.json`.

        Args:
            teacher_model: as the trainer's, of the first link. args: `DistillationArguments` of all links;
                `metric_for_best_model` (default "loss", the plain task loss) says what is best.
            trainer_class: with `DistillationMixin`.
            resume_from_checkpoint: True: links that are finished are left out, the one that was interrupted goes on
                from its last checkpoint. Models that are given (not functions) must be as they were at first.
            keywords: the trainer's (`train_dataset`, `eval_dataset`, `compute_metrics`, ...). A
                `teacher_processing_class` is of the first teacher alone.

        Raises:
            SettingError: before anything is trained, for any of the links; with resume also where a link that was begun
                has changed.
            TeacherError: a teacher that cannot teach the next student.
        """
        plan = planned(self.links, args, keywords, trainer_class, resume=resume_from_checkpoint)
        metric, greater = validation_of(args, keywords.get("eval_dataset"), keep=self.keep)
        results: list[LinkResult] = []
        found = [record.finished(one.folder) for one in plan]
        _wait(args)  # all processes have read what was there
        for one, result in zip(plan, found, strict=True):
            with named(one.link):
                teachers = _Teachers(teacher_model, results)
                record.check_link(one.folder, teachers.name(one))
                if result is None:
                    result = _train(one, teachers, trainer_class, resume=resume_from_checkpoint)
                if metric is not None and f"eval_{metric}" not in result.metrics:
                    raise SettingError(
                        f"metric_for_best_model={metric!r}: the evaluation gave {', '.join(sorted(result.metrics))}. "
                        "Name one of them, or return it from compute_metrics."
                    )
            results.append(result)
        return self._finish(results, plan, metric, greater)

    def _finish(
        self, results: list[LinkResult], plan: Sequence[Planned], metric: str | None, greater: bool
    ) -> ChainResult:
        kept, best = results[-1], None
        if metric is not None:
            best = best_of(results, metric, greater_is_better=greater).name
            small = [one for one in results if one.parameters <= results[-1].parameters]
            kept = best_of(small, metric, greater_is_better=greater) if self.keep == "best" else kept
        folder = os.path.dirname(plan[0].folder)
        chain = ChainResult(tuple(results), folder, metric, greater, best, kept.name)
        if plan[0].args.process_index == 0:
            number = next(i for i, one in enumerate(results) if one is kept)
            copied(os.path.join(plan[number].last_stage_folder, "student"), folder)
            write_text_whole(Path(folder, REPORT_JSON), chain.to_json())
            write_text_whole(Path(folder, REPORT), f"# chain\n\n{chain.markdown()}")
            console = Console()
            console.print(chain.table())
            console.print(chain.sentence(), markup=False, highlight=False)
        _wait(plan[0].args)
        return chain


@dataclasses.dataclass(frozen=True)
class _Teachers:
    """The teacher of the run, and the students so far."""

    first: Any
    students: list[LinkResult]

    def of(self, one: Planned) -> Any:
        folders = [student.folder for student in self.students]
        if not folders:
            return self.first
        return Ensemble([self.first, *folders]) if one.link.teacher == "all" else folders[-1]

    def name(self, one: Planned) -> str:
        first = self.first
        shown = Path(first).name if isinstance(first, (str, os.PathLike)) else type(first).__name__
        names = [shown, *(student.name for student in self.students)]
        return " + ".join(names) if one.link.teacher == "all" else names[-1]

    def model(self) -> tuple[Any, str | None]:
        """What a student may be made of, and its kind of head: the student before, or the teacher of the run."""
        return (self.students[-1].folder, self.students[-1].kind) if self.students else (self.first, None)


def _train(one: Planned, teachers: _Teachers, trainer_class: Any, *, resume: bool) -> LinkResult:
    source, kind = teachers.model()
    model = one.link.make_model(source, teacher_kind=kind, seed=one.args.seed + one.number)
    if hasattr(model, "peft_config") and not one.is_last:
        raise SettingError(
            "its student has adapters, and only the last link's may: the next link reads its teacher from a folder "
            "that holds the adapters alone. Merge them and go on in a chain of their own, or train this student whole."
        )
    parameters = parameter_count(model)
    record.check_link(one.folder, teachers.name(one), parameters)
    _wait(one.args)
    if one.args.process_index == 0:
        record.begin(one.folder, one.link.name, teachers.name(one), parameters)
    trained = train_in_stages(
        one.stages,
        model=model,
        teacher_model=teachers.of(one),
        args=one.args,
        trainer_class=trainer_class,
        resume_from_checkpoint=resume,
        **one.keywords,
    )
    result = _measured(one, trained, teachers.name(one), parameters)
    if one.args.process_index == 0:
        record.finish(result)
    _wait(one.args)
    return result


def _measured(one: Planned, trained: StagesResult, teacher: str, parameters: int) -> LinkResult:
    metrics, missing, seconds = {}, {}, None
    if trained.trainer.eval_dataset is None:
        missing["metrics"] = NO_EVALUATION
    else:
        metrics = trained.trainer.evaluate()
    hows = {stage.how for stage in trained.stages}
    if hows == {"trained"}:
        seconds = sum(stage.output.metrics["train_runtime"] for stage in trained.stages)
    else:
        missing["seconds"] = INTERRUPTED
    return LinkResult(
        name=one.link.name,
        teacher=teacher,
        folder=one.folder,
        parameters=parameters,
        metrics=metrics,
        seconds=seconds,
        how="trained" if hows == {"trained"} else "resumed",
        kind=trained.trainer.distiller.task.kind,
        not_measured=missing,
    )


def _wait(args: Any) -> None:
    """For all processes; `args` sets up what they speak by."""
    assert args.device is not None
    PartialState().wait_for_everyone()
