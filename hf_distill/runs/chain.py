"""Chain: several students, each trained by the previous student."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import TrainingArguments, set_seed

from hf_distill._types import Keywords
from hf_distill._utils import random_state_kept, write_text_whole
from hf_distill.compare.machine import parameter_count
from hf_distill.errors import HfDistillError, SettingError, check_choice
from hf_distill.objectives import Objective
from hf_distill.presets import Factory, Preset, Stage
from hf_distill.runs import record
from hf_distill.runs.results import INTERRUPTED, NO_EVALUATION, ChainResult, LinkResult, StagesResult, best_of
from hf_distill.runs.stages import STUDENT, PlannedStage, check_begun, check_call, plan_stages, train_in_stages
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.teachers.load import load_teacher
from hf_distill.trainer.mixin import DistillationMixin, DistillationTrainer
from hf_distill.trainer.publishing import copied

Keep = Literal["best", "last"]
REPORT, REPORT_JSON = "report.md", "report.json"
# Students are compared, so all links share the keywords that the comparison depends on.
_SHARED = ("eval_dataset", "compute_metrics")


@dataclass(frozen=True)
class Link:
    """A student of a chain.

    Args:
        name: the name of its folder, and its name in the report.
        model: the student; or a function that makes it, either without arguments or from its teacher (to start as a
            part of it). A function is called when the link begins, with a seed for each link.
        arguments: fields of `DistillationArguments` that override those of the run.
        objectives: as in `Stage`.
        keywords: keywords of the trainer that override those of the run.
        stages: a Preset or stages, instead of a single training with `objectives`.

    Raises:
        SettingError: if the name cannot be a folder's, or both objectives and stages are given.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> Link("assistant", lambda: Bert(config), {"alpha": 0.9}).name
    'assistant'
    """

    name: str
    model: nn.Module | Callable[..., nn.Module] = field(repr=False)
    arguments: Keywords = field(default_factory=dict)
    objectives: Factory | Sequence[Objective] = ()
    keywords: Keywords = field(default_factory=dict)
    stages: Preset | Sequence[Stage] = ()

    def __post_init__(self) -> None:
        record.check_names("link", [self.name])
        if not callable(self.model):
            raise SettingError(
                f"link {self.name!r}: model is a {type(self.model).__name__}. Pass a model, or a function returning it."
            )
        if self.stages and self.objectives:
            raise SettingError(f"link {self.name!r}: both objectives and stages. Give each Stage its objectives.")

    def make_stages(self) -> tuple[Stage, ...]:
        """Return the link's stages; their arguments and keywords override those of the link."""
        given = self.stages.stages if isinstance(self.stages, Preset) else tuple(self.stages)
        return tuple(
            Stage(
                stage.name, stage.objectives, {**self.arguments, **stage.arguments}, {**self.keywords, **stage.keywords}
            )
            for stage in given or (Stage("training", self.objectives),)
        )

    def make_model(self, teacher: Any, *, teacher_kind: str | None, seed: int) -> nn.Module:
        """Return the student. Its random weights depend only on the seed, so a resumed chain makes the same student.

        Args:
            teacher: a model or a folder, for a function that makes the student from its teacher.
            teacher_kind: the kind of head of the model in the folder, or None if it is not known.
            seed: the seed of this link.
        """
        if isinstance(self.model, nn.Module):
            return self.model
        with random_state_kept():
            arguments = [_loaded(teacher, teacher_kind)] if _takes_teacher(self.model) else []
            set_seed(seed)
            student = self.model(*arguments)
        if not isinstance(student, nn.Module):
            raise SettingError(
                f"the function returned a {type(student).__name__}. It must return the student, a model."
            )
        return student


def _takes_teacher(make: Callable[..., nn.Module]) -> bool:
    if inspect.isclass(make):  # the arguments of a class are not a teacher
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(make).parameters.values()
    return any(parameter.kind in kinds and parameter.default is inspect.Parameter.empty for parameter in parameters)


def _loaded(teacher: Any, kind: str | None) -> nn.Module:
    if isinstance(teacher, nn.Module):
        return teacher
    if kind is None:
        raise SettingError(
            f"the function makes the student from its teacher, and the teacher of the run is a "
            f"{type(teacher).__name__}. Load it, and pass the model as teacher_model=."
        )
    model: nn.Module = load_teacher(teacher, kind)
    return model


class Chain:
    """Students, each trained by the previous student: teacher assistants, progressive distillation, generations.

    Teacher assistants: Mirzadeh et al. 2020, Improved Knowledge Distillation via Teacher Assistant, section 3.

    Args:
        links: the links in order.
        keep: the student to put into the output folder. "best" is the student with the best validation among those that
            are no larger than the last, since the chain is meant to give a small student; the report says if a larger
            student was better. "last" is the last student.

    Raises:
        SettingError: if there are no links, two share a name or a model, or `keep` is unknown.

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
    >>> [(link.name, link.teacher) for link in result.links], result.kept
    ([('assistant', 'BertForSequenceClassification'), ('student', 'assistant')], 'student')
    """

    paper: ClassVar[str | None] = "mirzadeh2020assistant"

    def __init__(self, links: Sequence[Link], *, keep: Keep = "best") -> None:
        self.links, self.keep = tuple(links), keep
        if not self.links or not all(isinstance(link, Link) for link in self.links):
            raise SettingError("Chain: pass a list of one or more Link(name, model=..., arguments=...).")
        record.check_names("link", [link.name for link in self.links])
        check_choice("Chain: keep", keep, get_args(Keep))
        models = [id(link.model) for link in self.links if isinstance(link.model, nn.Module)]
        if len(set(models)) != len(models):
            raise SettingError("Chain: two links have the same model. Each link needs its own.")

    def __repr__(self) -> str:
        return f"Chain({list(self.links)}, keep={self.keep!r})"

    @classmethod
    def generations(
        cls,
        make_model: Callable[..., nn.Module],
        n: int,
        *,
        arguments: Keywords | None = None,
        objectives: Factory | Sequence[Objective] = (),
        keep: Keep = "best",
    ) -> Chain:
        """Return a chain of students of the same architecture; `result.ensemble()` has them all.

        Furlanello et al. 2018, Born-Again Neural Networks, section 3.

        Args:
            make_model: a function that makes a new student; each generation has its own seed.
            n: the number of generations.
            arguments: as in `Link`, for all generations.
            objectives: as in `Link`, for all generations.
            keep: as in `Chain`.

        Raises:
            SettingError: if n is less than 1, or a model is given instead of a function.

        >>> [link.name for link in Chain.generations(lambda: None, 2).links]
        ['generation-1', 'generation-2']
        """
        if n < 1 or isinstance(make_model, nn.Module):
            raise SettingError(
                f"Chain.generations: n={n!r} must be at least 1, and make_model a function that makes a model "
                f"(lambda: ...), not a model."
            )
        links = [Link(f"generation-{i}", make_model, dict(arguments or {}), objectives) for i in range(1, n + 1)]
        return cls(links, keep=keep)

    def run(
        self,
        *,
        teacher_model: Any,
        args: TrainingArguments,
        trainer_class: type[DistillationMixin] = DistillationTrainer,
        resume_from_checkpoint: bool = False,
        **keywords: Any,
    ) -> ChainResult:
        """Train the links in order. `<output_dir>/1-<name>`, `2-<name>`, ... hold a student each.

        Each link reads its teacher from the folder before, so that an interrupted chain gives the same students as an
        uninterrupted chain. `output_dir` gets the kept student, `report.md` and `report.json`.

        Args:
            teacher_model: the teacher of the first link, as in the trainer.
            args: the `DistillationArguments` of all links. `metric_for_best_model` (default "loss", the plain task
                loss) compares the students.
            trainer_class: the class of the trainers, with `DistillationMixin`.
            resume_from_checkpoint: if True, skip finished links and continue the interrupted link from its last
                checkpoint. Links with a model instead of a function need the initial model again.
            keywords: keywords of the trainer (`train_dataset`, `eval_dataset`, `compute_metrics`, ...). A
                `teacher_processing_class` is for the first teacher only.

        Raises:
            SettingError: before any training, if a link is not valid, or has changed since it began.
            TeacherError: if a teacher cannot teach the next student.
        """
        check_call("Chain.run", trainer_class, resume_from_checkpoint)
        if args.push_to_hub:
            raise SettingError(
                "Chain.run: push_to_hub=True, but the kept student is known only at the end. Load it from output_dir "
                "then, and call push_to_hub."
            )
        plan = self._plan(args, keywords, trainer_class, resume=resume_from_checkpoint)
        metric, greater = self._metric(args, keywords.get("eval_dataset"))
        results: list[LinkResult] = []
        earlier = [_finished_before(planned) for planned in plan]
        _wait(args)  # before the record changes, all processes must have read it
        for planned, result in zip(plan, earlier, strict=True):
            with _named(planned.link):
                teacher = _Teacher.after(results, teacher_model)
                record.check_unchanged(planned.folder, "it", {"teacher": teacher.name})
                if result is None:
                    result = _train(planned, teacher, trainer_class, resume=resume_from_checkpoint)
                if metric is not None and f"eval_{metric}" not in result.metrics:
                    raise SettingError(
                        f"metric_for_best_model={metric!r}: the evaluation gave {', '.join(sorted(result.metrics))}. "
                        "Choose one of them, or return it from compute_metrics."
                    )
            results.append(result)
        return self._finish(results, plan, metric, greater)

    def _plan(
        self, args: TrainingArguments, keywords: Keywords, trainer_class: type, *, resume: bool
    ) -> list[_PlannedLink]:
        """Return the links with their stages.

        Raises:
            SettingError: if a link is not valid, or has changed since it began.
        """
        output_dir = str(args.output_dir)
        folders = [record.folder_of(output_dir, number, link.name) for number, link in enumerate(self.links, 1)]
        record.check_folders(output_dir, folders, "link", resume=resume)
        plan = []
        for number, (link, folder) in enumerate(zip(self.links, folders, strict=True), 1):
            with _named(link):
                own = dataclasses.replace(args, output_dir=folder)
                given = _keywords_of(link, keywords, is_first=number == 1)
                stages = plan_stages(link.make_stages(), own, given, trainer_class)
                check_begun(stages, folder, resume=True)
                plan.append(_PlannedLink(link, number, number == len(self.links), stages, own, given))
        return plan

    def _metric(self, args: TrainingArguments, eval_dataset: Any) -> tuple[str | None, bool]:
        """Return the metric that compares the students, without "eval_" (None for no comparison); and its direction.

        Raises:
            SettingError: if the best student is to be kept and there is no eval_dataset.
        """
        if eval_dataset is None:
            if self.keep == "best":
                raise SettingError(
                    "Chain: keep='best' needs an eval_dataset to find the best student. Pass eval_dataset=, or "
                    'Chain(..., keep="last").'
                )
            return None, False
        if args.metric_for_best_model is None:
            return "loss", False
        return args.metric_for_best_model.removeprefix("eval_"), bool(args.greater_is_better)

    def _finish(
        self, results: list[LinkResult], plan: Sequence[_PlannedLink], metric: str | None, greater: bool
    ) -> ChainResult:
        """Put the kept student and the report into the output folder."""
        kept, best = results[-1], None
        if metric is not None:
            best = best_of(results, metric, greater_is_better=greater).name
            small = [link for link in results if link.parameters <= results[-1].parameters]
            kept = best_of(small, metric, greater_is_better=greater) if self.keep == "best" else kept
        folder = os.path.dirname(plan[0].folder)
        chain = ChainResult(tuple(results), folder, metric, greater, best, kept.name)
        if plan[0].args.process_index == 0:
            source = next(planned for planned in plan if planned.link.name == kept.name)
            copied(os.path.join(source.stages[-1].folder, STUDENT), folder)
            write_text_whole(Path(folder, REPORT_JSON), chain.to_json())
            write_text_whole(Path(folder, REPORT), f"# chain\n\n{chain.markdown()}")
            console = Console()
            console.print(chain.table())
            console.print(chain.sentence(), markup=False, highlight=False)
        _wait(plan[0].args)
        return chain


@dataclass(frozen=True)
class _PlannedLink:
    """A link with its stages, and with the arguments and keywords that they share."""

    link: Link
    number: int
    is_last: bool
    stages: list[PlannedStage]
    args: TrainingArguments
    keywords: Keywords

    @property
    def folder(self) -> str:
        return str(self.args.output_dir)


@dataclass(frozen=True)
class _Teacher:
    """The teacher of a link.

    Attributes:
        source: the teacher of the run, or the folder of the student before.
        name: its name in the record and the report.
        kind: its kind of head, or None for the teacher of the run.
    """

    source: Any
    name: str
    kind: str | None = None

    @classmethod
    def after(cls, students: Sequence[LinkResult], first: Any) -> _Teacher:
        """Return the last student, or the teacher of the run if there is no student yet."""
        if students:
            return cls(students[-1].folder, students[-1].name, students[-1].kind)
        return cls(first, Path(first).name if isinstance(first, (str, os.PathLike)) else type(first).__name__)


@contextmanager
def _named(link: Link) -> Iterator[None]:
    """Put the name of the link in front of error messages."""
    try:
        yield
    except HfDistillError as error:
        raise type(error)(f"link {link.name!r}: {error}") from error


def _keywords_of(link: Link, keywords: Keywords, *, is_first: bool) -> Keywords:
    """Return the run's keywords for a link; the link's own are in its stages.

    Raises:
        SettingError: if the link has keywords that all links share, or data with columns for another link's teacher.
    """
    own = [{**link.keywords, **stage.keywords} for stage in link.make_stages()]
    misplaced = [name for name in _SHARED if any(name in stage for stage in own)]
    if misplaced:
        raise SettingError(f"{misplaced[0]}= must be the same for all students. Pass it to run().")
    if is_first:
        return dict(keywords)
    given = {name: value for name, value in keywords.items() if name != "teacher_processing_class"}
    for name in ("train_dataset", "eval_dataset"):
        columns = getattr({**given, **link.keywords}.get(name), "column_names", None) or ()
        found = [column for column in columns if column.startswith(TEACHER_PREFIX)]
        if found:
            raise SettingError(
                f"{name} has {', '.join(found)}, inputs of the first teacher. The teacher of this link is a student. "
                f"Pass data without these columns: Link(..., keywords={{{name!r}: ...}})."
            )
    return given


def _finished_before(planned: _PlannedLink) -> LinkResult | None:
    """Return the recorded result, with the folder where it is now: it may have been moved."""
    found = record.read(planned.folder, record.FINISHED)
    return None if found is None else LinkResult(**{**found, "folder": planned.folder, "how": "finished before"})


def _train(
    planned: _PlannedLink, teacher: _Teacher, trainer_class: type[DistillationMixin], *, resume: bool
) -> LinkResult:
    seed = planned.args.seed + planned.number
    model = planned.link.make_model(teacher.source, teacher_kind=teacher.kind, seed=seed)
    if hasattr(model, "peft_config") and not planned.is_last:
        raise SettingError(
            "the student has adapters, and only the last link's may: its folder, from which the next link reads its "
            "teacher, holds only the adapters. Merge them, and continue in another chain."
        )
    parameters = parameter_count(model)
    settings = {"teacher": teacher.name, "parameters": parameters}
    record.check_unchanged(planned.folder, "it", settings)
    _wait(planned.args)
    if planned.args.process_index == 0:
        record.write(planned.folder, record.BEGUN, settings)
    trained = train_in_stages(
        planned.link.make_stages(),
        model=model,
        teacher_model=teacher.source,
        args=planned.args,
        trainer_class=trainer_class,
        resume_from_checkpoint=resume,
        **planned.keywords,
    )
    result = _measured(planned, trained, teacher.name, parameters)
    if planned.args.process_index == 0:
        record.write(planned.folder, record.FINISHED, dataclasses.asdict(result))
    _wait(planned.args)
    return result


def _measured(planned: _PlannedLink, trained: StagesResult, teacher: str, parameters: int) -> LinkResult:
    """Evaluate the saved student of a link."""
    trainer, missing, metrics, seconds = trained.trainer, {}, {}, None
    if trainer.eval_dataset is None:
        missing["metrics"] = NO_EVALUATION
    else:
        metrics = trainer.evaluate()
    whole = all(stage.how == "trained" for stage in trained.stages)
    if whole:
        seconds = sum(stage.output.metrics["train_runtime"] for stage in trained.stages)
    else:
        missing["seconds"] = INTERRUPTED
    return LinkResult(
        name=planned.link.name,
        teacher=teacher,
        folder=planned.folder,
        parameters=parameters,
        metrics=metrics,
        seconds=seconds,
        how="trained" if whole else "resumed",
        kind=str(trainer.distiller.task),
        not_measured=missing,
    )


def _wait(args: TrainingArguments) -> None:
    """Wait for all processes."""
    assert args.device is not None  # reading it sets up the process group
    PartialState().wait_for_everyone()
