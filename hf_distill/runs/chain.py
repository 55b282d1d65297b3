"""Link: one student of a chain, what it is made by and trained with. What all links share is given to `Chain.run`."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import set_seed

from hf_distill._utils import random_state_kept, write_text_whole
from hf_distill.compare.machine import parameter_count
from hf_distill.errors import HfDistillError, SettingError, did_you_mean
from hf_distill.objectives import Objective
from hf_distill.presets import Factory, Preset, Stage
from hf_distill.runs import record
from hf_distill.runs.results import (
    FINISHED_BEFORE,
    INTERRUPTED,
    NO_EVALUATION,
    ChainResult,
    LinkResult,
    StagesResult,
    best_of,
)
from hf_distill.runs.stage import check_keywords, checked_stages, stage_arguments
from hf_distill.runs.stages import train_in_stages
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.teachers.load import load_teacher
from hf_distill.trainer.mixin import DistillationMixin, DistillationTrainer
from hf_distill.trainer.publishing import copied


@dataclass(frozen=True)
class Link:
    """One student of a chain.

    Args:
        name: of its folder, and in the report.
        model: the student, or a function that makes it: of nothing, or of its teacher (to begin as a part of it). A
            function is called when its turn comes, each link with a seed of its own.
        arguments: fields of `DistillationArguments`, over those of the run.
        objectives: as a `Stage` takes them.
        stages: a Preset or stages, in place of one training with `objectives`.
        keywords: keywords of the trainer, over those of the run.

    Raises:
        SettingError: a name that is no folder's, objectives beside stages.

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


# Students are compared, so what they are compared by is the same for all.
_SHARED = ("eval_dataset", "compute_metrics")


@dataclasses.dataclass(frozen=True)
class Planned:
    """One link, as it will be trained. `last_stage_folder` has a folder with the student alone."""

    link: Link
    number: int
    is_last: bool
    stages: tuple[Stage, ...]
    args: Any
    keywords: dict[str, Any]
    last_stage_folder: str

    @property
    def folder(self) -> str:
        return str(self.args.output_dir)


def planned(
    links: Sequence[Link], args: Any, keywords: Mapping[str, Any], trainer_class: Any, *, resume: bool
) -> list[Planned]:
    """Raises SettingError: a link that cannot be, or is not the one that was begun."""
    _check_call(args, trainer_class, resume)
    folders = [os.path.join(args.output_dir, f"{number}-{link.name}") for number, link in enumerate(links, 1)]
    record.check_folders(str(args.output_dir), folders, "links", resume=resume)
    plan = []
    for number, (link, folder) in enumerate(zip(links, folders, strict=True), 1):
        with named(link):
            stages = checked_stages(link.make_stages())
            own = dataclasses.replace(args, output_dir=folder)
            of_stages = stage_arguments(stages, own)
            given = _keywords_of(link, keywords, is_first=number == 1)
            check_keywords(stages, given, trainer_class)
            record.check_folders(folder, [str(one.output_dir) for one in of_stages], "stages", resume=True)
            for stage, one in zip(stages, of_stages, strict=True):
                settings = record.stage_settings(stage, one)
                record.check_unchanged(str(one.output_dir), f"stage {stage.name!r}", settings)
            last = str(of_stages[-1].output_dir)
            plan.append(Planned(link, number, number == len(links), stages, own, given, last))
    return plan


def validation_of(args: Any, eval_dataset: Any, *, keep: str) -> tuple[str | None, bool]:
    """What links are compared by, without "eval_", and whether more is better; None: they are not compared.

    Raises:
        SettingError: the best is to be kept, and there is nothing to find it by.
    """
    if eval_dataset is None:
        if keep == "best":
            raise SettingError(
                "Chain: the best student is kept, and there is no eval_dataset to find it by. Pass eval_dataset=, or "
                'Chain(..., keep="last").'
            )
        return None, False
    if args.metric_for_best_model is None:
        return "loss", False
    return str(args.metric_for_best_model).removeprefix("eval_"), bool(args.greater_is_better)


def _check_call(args: Any, trainer_class: Any, resume: Any) -> None:
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, DistillationMixin)):
        raise SettingError(
            f"Chain.run: trainer_class={trainer_class!r}. Give DistillationTrainer, Seq2SeqDistillationTrainer, or a "
            "class of your own with DistillationMixin before its Trainer."
        )
    if not isinstance(resume, bool):
        raise SettingError(
            f"Chain.run: resume_from_checkpoint={resume!r}. True or False: which link, and which checkpoint of it, is "
            "found in output_dir."
        )
    if args.push_to_hub:
        raise SettingError(
            "Chain.run: push_to_hub=True: which student is kept is known at the end. Load it from output_dir then, and "
            "push it (push_to_hub)."
        )


def _keywords_of(link: Link, keywords: Mapping[str, Any], *, is_first: bool) -> dict[str, Any]:
    """The run's, for this link; a link's own are in its stages.

    Raises:
        SettingError: keywords that links share, or data with columns of a teacher that this link does not have.
    """
    for stage in link.make_stages():
        for name in _SHARED:
            if name in stage.keywords:
                raise SettingError(f"{name}= does not go here: students are compared by the same. Pass it to run().")
    given = dict(keywords)
    if is_first:
        return given
    given.pop("teacher_processing_class", None)  # its teacher read the inputs of a student, and so does it
    for name in ("train_dataset", "eval_dataset"):
        data = {**given, **link.keywords}.get(name)
        found = [column for column in getattr(data, "column_names", None) or () if column.startswith(TEACHER_PREFIX)]
        if found:
            raise SettingError(
                f"{name} has {', '.join(found)}: inputs of the first teacher. This link's teacher is a student and "
                f"reads the student's. Leave them out of its data: Link(..., keywords={{{name!r}: ...}}), or give the "
                "student's alone."
            )
    return given


KEEP = ("best", "last")
REPORT, REPORT_JSON = "report.md", "report.json"


class Chain:
    """Students of which each teaches the next: teacher assistants, progressive distillation, generations.

    Teacher assistants: Mirzadeh et al. 2020, Improved Knowledge Distillation via Teacher Assistant, section 3.

    Args:
        links: in order.
        keep: whose student is put into the output folder. "best": of those no larger than the last, the one with the
            best validation (a larger assistant is no answer to the wish for a small student); it is said where a larger
            one was better. "last": the last, whatever its validation.

    Raises:
        SettingError: no links, two of one name, one model in two links, no such keep.

    >>> import tempfile
    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill.trainer.arguments import DistillationArguments
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
            teacher_model: as the trainer's, of the first link.
            args: `DistillationArguments` of all links; `metric_for_best_model` (default "loss", the plain task loss)
                says what is best.
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
        found = [_finished_before(one) for one in plan]
        _wait(args)  # all processes have read what was there
        for one, result in zip(plan, found, strict=True):
            with named(one.link):
                teachers = _Teachers(teacher_model, results)
                record.check_unchanged(one.folder, "it", {"teacher": teachers.name})
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

    @property
    def last(self) -> Any:
        """The teacher of the next link: the student before, in its folder; for the first link that of the run."""
        return self.students[-1].folder if self.students else self.first

    @property
    def name(self) -> str:
        if self.students:
            return self.students[-1].name
        first = self.first
        return Path(first).name if isinstance(first, (str, os.PathLike)) else type(first).__name__

    def model(self) -> tuple[Any, str | None]:
        """What a student may be made of, and its kind of head: the student before, or the teacher of the run."""
        return (self.students[-1].folder, self.students[-1].kind) if self.students else (self.first, None)


def _finished_before(one: Planned) -> LinkResult | None:
    """Its folder is where it is found now: it may have been moved."""
    found = record.read(one.folder, record.FINISHED)
    return None if found is None else LinkResult(**{**found, "folder": one.folder, "how": FINISHED_BEFORE})


def _train(one: Planned, teachers: _Teachers, trainer_class: Any, *, resume: bool) -> LinkResult:
    source, kind = teachers.model()
    model = one.link.make_model(source, teacher_kind=kind, seed=one.args.seed + one.number)
    if hasattr(model, "peft_config") and not one.is_last:
        raise SettingError(
            "its student has adapters, and only the last link's may: the next link reads its teacher from a folder "
            "that holds the adapters alone. Merge them and go on in a chain of their own, or train this student whole."
        )
    parameters = parameter_count(model)
    settings = {"teacher": teachers.name, "parameters": parameters}
    record.check_unchanged(one.folder, "it", settings)
    _wait(one.args)
    if one.args.process_index == 0:
        record.write(one.folder, record.BEGUN, settings)
    trained = train_in_stages(
        one.stages,
        model=model,
        teacher_model=teachers.last,
        args=one.args,
        trainer_class=trainer_class,
        resume_from_checkpoint=resume,
        **one.keywords,
    )
    result = _measured(one, trained, teachers.name, parameters)
    if one.args.process_index == 0:
        record.write(one.folder, record.FINISHED, dataclasses.asdict(result))
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
        kind=str(trained.trainer.distiller.task),
        not_measured=missing,
    )


def _wait(args: Any) -> None:
    """For all processes; `args` sets up what they speak by."""
    assert args.device is not None
    PartialState().wait_for_everyone()
