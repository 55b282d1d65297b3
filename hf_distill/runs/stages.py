"""train_in_stages: several trainings of the same student, one after another."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from hf_distill._compat import forget_preparation
from hf_distill._types import Keywords, State
from hf_distill._utils import random_state_kept, write_text_whole
from hf_distill.blend import compares_nothing, uses_teacher
from hf_distill.distiller import Distiller
from hf_distill.errors import HfDistillError, SettingError, did_you_mean
from hf_distill.presets import Preset, Stage
from hf_distill.runs import record
from hf_distill.runs.results import How, StageResult, StagesResult
from hf_distill.tasks import make_task
from hf_distill.teachers import Teacher, as_teacher
from hf_distill.teachers.load import find_tokenizer, load_teacher
from hf_distill.trainer.arguments import blend_of, setting
from hf_distill.trainer.interruptions import last_whole_checkpoint
from hf_distill.trainer.mixin import DistillationMixin, DistillationTrainer
from hf_distill.trainer.publishing import CARD

STUDENT = "student"
"""The folder of a stage's student, alone in it: `Trainer` takes folders next to an adapter for more adapters."""

# Keywords and arguments that do not belong to a stage, and where they belong.
_OTHER_KEYWORDS = {
    "model_init": "pass model=: all stages train the same student",
    "objectives": "give each Stage its objectives",
    "distiller": "give each Stage its objectives and arguments",
    "optimizers": "each stage makes its own; pass optimizer_cls_and_kwargs=",
}
_OTHER_ARGUMENTS = {
    "output_dir": "each stage has a folder in the run's",
    "teacher_dtype": "the teacher is loaded once; set it in args",
    "push_to_hub": "the last stage's student is pushed; set it in args",
    "resume_from_checkpoint": "pass it to train_in_stages",
}


@dataclass(frozen=True)
class PlannedStage:
    """A stage with the arguments and keywords of its trainer."""

    stage: Stage
    args: TrainingArguments
    keywords: Keywords

    @property
    def folder(self) -> str:
        return str(self.args.output_dir)

    @property
    def needs_teacher(self) -> bool:
        alpha = blend_of(self.args)["alpha"]
        return setting(self.args, "evaluate_with_teacher") or uses_teacher(alpha, self.stage.make_objectives())

    def make_teacher(self, teacher: Any, model: nn.Module, tokenizer: Any = None) -> Teacher:
        """Return the `Teacher` that the trainer of this stage would make."""
        return as_teacher(
            teacher,
            str(make_task(model, self.keywords.get("task"))),
            processing_class=self.keywords.get("teacher_processing_class") or tokenizer,
            dtype=setting(self.args, "teacher_dtype"),
            label_matching=setting(self.args, "label_matching"),
        )


def train_in_stages(
    stages: Preset | Iterable[Stage],
    *,
    model: nn.Module,
    teacher_model: Any = None,
    args: TrainingArguments,
    trainer_class: type[DistillationMixin] = DistillationTrainer,
    resume_from_checkpoint: bool = False,
    **keywords: Any,
) -> StagesResult:
    """Train the same student in several stages, each with its own objectives, arguments, optimizer and folder.

    `<output_dir>/1-<name>`, `2-<name>`, ... hold the checkpoints of each stage and its student (in `student`), and
    `output_dir` holds the last student. Prints a summary. Works in one process or several (DDP) that share the folders.

    Args:
        stages: a Preset, or stages in order.
        model: the student. It is trained in place.
        teacher_model: as in the trainer; a folder or Hub id is loaded once.
        args: the `DistillationArguments` of all stages; the arguments of a stage override them.
        trainer_class: the class of the trainers, with `DistillationMixin`.
        resume_from_checkpoint: if True, skip finished stages and continue the interrupted stage from its last
            checkpoint, or its start. `model` must be the initial student again. Without a record it trains all stages.
        keywords: keywords of the trainer (`train_dataset`, `data_collator`, ...). All stages share the callbacks.

    Raises:
        SettingError: before any training, if a stage is not valid, or has changed since it began.
        TeacherError: if the teacher cannot teach this student in one of the stages.

    >>> import tempfile
    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill.trainer.arguments import DistillationArguments
    >>> from hf_distill.objectives import HiddenMatch
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> args = DistillationArguments(
    ...     tempfile.mkdtemp(), max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
    ... )
    >>> result = train_in_stages(
    ...     [Stage("hidden", [HiddenMatch()], {"alpha": None}), Stage("logits", arguments={"alpha": 1.0})],
    ...     model=Bert(config), teacher_model=Bert(config), args=args,
    ...     train_dataset=[{"input_ids": [1, 2], "labels": 0}, {"input_ids": [3, 4], "labels": 1}],
    ... )
    {'train_runtime': ...}
    {'train_runtime': ...}
    stage     steps    loss  folder
    hidden        1  ...
    logits        1  ...
    student: ...
    """
    if not isinstance(model, nn.Module):
        raise SettingError(f"train_in_stages: model is a {type(model).__name__}. Pass the student itself, a model.")
    check_call("train_in_stages", trainer_class, resume_from_checkpoint)
    plan = plan_stages(stages, args, keywords, trainer_class)
    result = _train(plan, model, teacher_model, trainer_class, str(args.output_dir), resume=resume_from_checkpoint)
    if result.trainer.is_world_process_zero():
        print(result)
    return result


def check_call(caller: str, trainer_class: type[DistillationMixin], resume: bool) -> None:
    """Check the arguments that `train_in_stages` and `Chain.run` share.

    Raises:
        SettingError: if one of them is not valid.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, DistillationMixin)):
        raise SettingError(
            f"{caller}: trainer_class={trainer_class!r} is not a class with DistillationMixin. Pass "
            "DistillationTrainer, Seq2SeqDistillationTrainer, or your own."
        )
    if not isinstance(resume, bool):
        raise SettingError(
            f"{caller}: resume_from_checkpoint={resume!r}. Pass True or False: the checkpoint is found in output_dir."
        )


def plan_stages(
    stages: Preset | Iterable[Stage], args: TrainingArguments, keywords: Keywords, trainer_class: type
) -> list[PlannedStage]:
    """Return the stages with the arguments and keywords of the run, overridden by their own.

    Raises:
        SettingError: if there are no stages, or a name, argument or keyword is not valid.
    """
    given = stages.stages if isinstance(stages, Preset) else tuple(stages)
    if not given or not all(isinstance(stage, Stage) for stage in given):
        raise SettingError(
            "train_in_stages: pass a Preset, or one or more Stage(name, objectives, arguments) in order."
        )
    record.check_names("stage", [stage.name for stage in given])
    fields = {field.name for field in dataclasses.fields(args) if field.init}
    known = _keywords_of(trainer_class)
    _check_known("train_in_stages", "keyword", keywords, known, _OTHER_KEYWORDS)
    plan = []
    for number, stage in enumerate(given, 1):
        caller = f"stage {stage.name!r}"
        _check_known(caller, "argument", stage.arguments, fields, _OTHER_ARGUMENTS)
        _check_known(caller, "keyword", stage.keywords, known, _OTHER_KEYWORDS)
        own = {"output_dir": record.folder_of(str(args.output_dir), number, stage.name), **stage.arguments}
        if args.push_to_hub and number < len(given):
            own["push_to_hub"] = False
        elif args.push_to_hub and args.hub_model_id is None:
            own["hub_model_id"] = Path(str(args.output_dir)).absolute().name
        try:
            plan.append(PlannedStage(stage, dataclasses.replace(args, **own), {**keywords, **stage.keywords}))
        except ValueError as error:
            raise SettingError(f"{caller}: {error}") from error
    return plan


def _keywords_of(trainer_class: type) -> set[str]:
    constructors = [vars(cls)["__init__"] for cls in trainer_class.__mro__[:-1] if "__init__" in vars(cls)]
    names = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    return names - {"self", "model", "args", "teacher_model"}


def _check_known(caller: str, what: str, given: Iterable[str], known: set[str], elsewhere: Mapping[str, str]) -> None:
    for name in given:
        if name in elsewhere:
            raise SettingError(f"{caller}: {name}= does not belong here: {elsewhere[name]}.")
        if name not in known:
            hint = did_you_mean(name, known) or f" It must be one of: {', '.join(sorted(known))}."
            raise SettingError(f"{caller}: there is no {what} {name!r}.{hint}")


def check_begun(plan: Sequence[PlannedStage], output_dir: str, *, resume: bool) -> list[State]:
    """Check that the stages in `output_dir` are those of the plan, and return the settings of each stage.

    Raises:
        SettingError: if other stages began there, or a stage began with other settings.
    """
    record.check_folders(output_dir, [planned.folder for planned in plan], "stage", resume=resume)
    settings = [record.stage_settings(planned.stage, planned.args) for planned in plan]
    for planned, now in zip(plan, settings, strict=True):
        record.check_unchanged(planned.folder, f"stage {planned.stage.name!r}", now)
    return settings


def _train(
    plan: Sequence[PlannedStage],
    model: nn.Module,
    teacher_model: Any,
    trainer_class: type[DistillationMixin],
    output_dir: str,
    *,
    resume: bool,
) -> StagesResult:
    settings = check_begun(plan, output_dir, resume=resume)
    earlier = [_finished_before(planned) for planned in plan]
    # The last trainer is made even if nothing is left to train: it holds the student, to evaluate or push it.
    left = [planned for planned, result in zip(plan, earlier, strict=True) if result is None or planned is plan[-1]]
    teacher_of = _teachers(teacher_model, model, left)
    _check_distillers(left, model, teacher_of)
    results: list[StageResult] = []
    trainer: DistillationMixin | None = None
    for planned, result, own in zip(plan, earlier, settings, strict=True):
        if result is None or planned is plan[-1]:
            objectives = planned.stage.make_objectives()
            trainer = trainer_class(
                model=model,
                teacher_model=teacher_of(planned),
                args=planned.args,
                objectives=objectives,
                **planned.keywords,
            )
            _check_not_sharded(trainer, plan)
        if result is None:
            assert trainer is not None
            unloaded = results[-1].folder if results and results[-1].how == "finished before" else None
            result = _run(trainer, planned, own, unloaded, resume=resume)
            _save(trainer, planned, result, final=output_dir if planned is plan[-1] else None)
        results.append(result)
    assert trainer is not None
    if results[-1].how == "finished before":
        _load_student(trainer, results[-1].folder)
    return StagesResult(tuple(results), output_dir, trainer)


def _teachers(teacher_model: Any, model: nn.Module, stages: Sequence[PlannedStage]) -> Callable[[PlannedStage], Any]:
    """Return a function that gives the teacher of a stage. A folder or Hub id is loaded once, with its tokenizer."""
    if not isinstance(teacher_model, (str, os.PathLike)) or not any(planned.needs_teacher for planned in stages):
        return lambda planned: teacher_model
    kind = str(make_task(model, stages[0].keywords.get("task")))
    with random_state_kept():
        loaded = load_teacher(teacher_model, kind, dtype=setting(stages[0].args, "teacher_dtype"))
        tokenizer = find_tokenizer(teacher_model)
    return lambda planned: planned.make_teacher(loaded, model, tokenizer)


def _check_distillers(
    stages: Sequence[PlannedStage], model: nn.Module, teacher_of: Callable[[PlannedStage], Any]
) -> None:
    """Make the distiller of each stage, so that a later stage fails before the first one trains."""
    for planned in stages:
        blend, objectives, teacher = blend_of(planned.args), planned.stage.make_objectives(), teacher_of(planned)
        if compares_nothing(blend["alpha"], objectives) and not planned.needs_teacher:
            continue  # then any class of student can be trained
        task, processing_class = (planned.keywords.get(name) for name in ("task", "processing_class"))
        try:
            teacher = planned.make_teacher(teacher, model) if teacher is not None and planned.needs_teacher else None
            Distiller(
                model, teacher, task=task, processing_class=processing_class, objectives=objectives, seed=0, **blend
            )
        except HfDistillError as error:
            raise type(error)(f"stage {planned.stage.name!r}: {error}") from error


def _check_not_sharded(trainer: DistillationMixin, plan: Sequence[PlannedStage]) -> None:
    kind = trainer.accelerator.distributed_type
    if len(plan) > 1 and kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise SettingError(
            f"train_in_stages with {kind.value}: a sharded student cannot be passed to the next stage. Use DDP, or a "
            "program for each stage: a DistillationTrainer that starts from the saved student."
        )


def _finished_before(planned: PlannedStage) -> StageResult | None:
    found = record.read(planned.folder, record.FINISHED)
    if found is None:
        return None
    history = found.pop("log_history")
    return StageResult(planned.stage.name, planned.folder, TrainOutput(**found), history, "finished before")


def _run(
    trainer: DistillationMixin, planned: PlannedStage, settings: State, unloaded: str | None, *, resume: bool
) -> StageResult:
    """Train a stage from its last checkpoint, or from its start.

    Args:
        trainer: the trainer of the stage.
        planned: the stage.
        settings: its settings, for the record.
        unloaded: the folder of the previous stage if the model does not hold its student yet.
        resume: whether to look for a checkpoint.
    """
    # Without the optimizer's state, only a start from the beginning is exact.
    resumable = resume and not planned.args.save_only_model
    checkpoint = last_whole_checkpoint(planned.folder) if resumable else None
    if checkpoint is None and unloaded is not None:
        _load_student(trainer, unloaded)
    trainer.accelerator.wait_for_everyone()  # before the record changes, all processes must have read it
    if trainer.args.should_save:
        record.write(planned.folder, record.BEGUN, settings)
    output = trainer.train(resume_from_checkpoint=checkpoint)
    how: How = "trained" if checkpoint is None else "resumed"
    return StageResult(planned.stage.name, planned.folder, output, list(trainer.state.log_history), how)


def _load_student(trainer: DistillationMixin, folder: str) -> None:
    """Load the weights only: parameters that objectives learned belong to their stage."""
    with random_state_kept():
        trainer._load_student(os.path.join(folder, STUDENT))


def _save(trainer: DistillationMixin, planned: PlannedStage, result: StageResult, *, final: str | None) -> None:
    """Save the student with a card, and then record the stage as finished.

    Args:
        trainer: the trainer of the stage.
        planned: the stage.
        result: its result.
        final: the folder of the run after its last stage, else None.
    """
    trainer.save_model(os.path.join(planned.folder, STUDENT), _internal_call=True)  # the flag prevents a push
    trainer.create_model_card(model_name=None if final is None else Path(final).absolute().name)
    if final is not None:
        trainer.save_model(final, _internal_call=True)
        card = Path(planned.folder, CARD)
        if trainer.is_world_process_zero() and card.is_file():
            write_text_whole(Path(final, CARD), card.read_text(encoding="utf-8"))
    # Mixed precision wraps the forward, and the next stage wraps it again.
    forget_preparation(trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        record.write(planned.folder, record.FINISHED, {**result.output._asdict(), "log_history": result.log_history})
    trainer.accelerator.wait_for_everyone()
    if final is not None and trainer.args.push_to_hub:
        trainer.push_to_hub()
