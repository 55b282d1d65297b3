"""train_in_stages: the stages one after another on the same student. How one stage trains is the trainer's business."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from torch import nn
from transformers.trainer_utils import TrainOutput

from hf_distill._compat import forget_preparation
from hf_distill._utils import random_state_kept
from hf_distill.blend import compares_nothing, uses_teacher
from hf_distill.distiller import Distiller
from hf_distill.errors import HfDistillError, SettingError
from hf_distill.presets import Preset, Stage
from hf_distill.runs import record
from hf_distill.runs.results import FINISHED_BEFORE, StageResult, StagesResult
from hf_distill.runs.stage import check_keywords, checked_stages, stage_arguments
from hf_distill.tasks import make_task
from hf_distill.teachers import as_teacher
from hf_distill.teachers.load import find_tokenizer, load_teacher
from hf_distill.trainer.arguments import blend_of, setting
from hf_distill.trainer.interruptions import last_whole_checkpoint
from hf_distill.trainer.mixin import DistillationMixin, DistillationTrainer
from hf_distill.trainer.publishing import CARD

# In a folder of its own: Trainer takes folders beside an adapter, checkpoints say, for more adapters.
_STUDENT = "student"


@dataclass(frozen=True)
class _Planned:
    """One stage, its arguments, and the trainer's keywords."""

    stage: Stage
    args: Any
    keywords: dict[str, Any]

    @property
    def folder(self) -> str:
        return str(self.args.output_dir)

    @property
    def needs_teacher(self) -> bool:
        alpha = blend_of(self.args)["alpha"]
        return setting(self.args, "evaluate_with_teacher") or uses_teacher(alpha, self.stage.make_objectives())


def train_in_stages(
    stages: Preset | Iterable[Stage],
    *,
    model: Any,
    teacher_model: Any = None,
    args: Any,
    trainer_class: type[DistillationMixin] = DistillationTrainer,
    resume_from_checkpoint: bool = False,
    **keywords: Any,
) -> StagesResult:
    """Train the same student in several stages, each with its own objectives, arguments, optimizer and folder.

    `<output_dir>/1-<name>`, `2-<name>`, ... hold the checkpoints of each stage and its student (in `student`),
    `output_dir` that of the last. A summary is printed. In one process or several (DDP), which all see the folders.

    Args:
        stages: a Preset, or stages in order.
        model: the student, a model; it is trained in place.
        teacher_model: as the trainer's; a folder or Hub id is loaded once.
        args: `DistillationArguments` of all stages; a stage's own are put over them.
        trainer_class: with `DistillationMixin`.
        resume_from_checkpoint: True: stages that are finished are left out; the one that was interrupted goes on from
            its last checkpoint, or its start. Give `model` as it was at first. Nothing there: from the beginning.
        keywords: the trainer's (`train_dataset`, `data_collator`, ...). Callbacks are shared by the stages.

    Raises:
        SettingError: before anything is trained, for any of the stages; with resume also where a stage that was begun
            has changed.
        TeacherError: a teacher that cannot teach this student in one of the stages.

    >>> import tempfile
    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill.trainer.arguments import DistillationArguments
    >>> from hf_distill.objectives import HiddenMatch
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> args = DistillationArguments(
    ...     tempfile.mkdtemp(), max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
    ... )
    >>> result = train_in_stages(
    ...     [Stage("inside", [HiddenMatch()], {"alpha": None}), Stage("logits", arguments={"alpha": 1.0})],
    ...     model=Bert(config), teacher_model=Bert(config), args=args,
    ...     train_dataset=[{"input_ids": [1, 2], "labels": 0}, {"input_ids": [3, 4], "labels": 1}],
    ... )
    {'train_runtime': ...}
    {'train_runtime': ...}
    stage     steps    loss  folder
    inside        1  ...
    logits        1  ...
    student: ...
    """
    listed = checked_stages(stages)
    _check_call(model, trainer_class, resume_from_checkpoint)
    check_keywords(listed, keywords, trainer_class)
    plan = [
        _Planned(stage, own, {**keywords, **stage.keywords})
        for stage, own in zip(listed, stage_arguments(listed, args), strict=True)
    ]
    trained, trainer = _train(plan, model, teacher_model, trainer_class, resume_from_checkpoint, str(args.output_dir))
    if trainer.is_world_process_zero():
        print(StagesResult(tuple(trained), str(args.output_dir), trainer))
    return StagesResult(tuple(trained), str(args.output_dir), trainer)


def _train(
    plan: Sequence[_Planned], model: Any, teacher_model: Any, trainer_class: Any, resume: bool, output_dir: str
) -> tuple[list[StageResult], Any]:
    """What became of each stage, and the last one's trainer."""
    settings = [record.stage_settings(one.stage, one.args) for one in plan]
    record.check_folders(output_dir, [one.folder for one in plan], "stages", resume=resume)
    for one, now in zip(plan, settings, strict=True):
        record.check_unchanged(one.folder, f"stage {one.stage.name!r}", now)
    results = [_finished_before(one) for one in plan]
    # The last trainer is made even where nothing is left to train: it holds the student, to evaluate or push.
    made = [one for one, result in zip(plan, results, strict=True) if result is None or one is plan[-1]]
    teacher_of = _teachers(teacher_model, model, made)
    _check_distillers(made, model, teacher_of)
    trained: list[StageResult] = []
    trainer: Any = None
    for one, result, own in zip(plan, results, settings, strict=True):
        if result is None or one is plan[-1]:
            trainer = trainer_class(
                model=model,
                teacher_model=teacher_of(one),
                args=one.args,
                objectives=one.stage.make_objectives(),
                **one.keywords,
            )
            _check_not_sharded(trainer, plan)
        if result is None:
            student_of = trained[-1].folder if trained and trained[-1].how == FINISHED_BEFORE else None
            result = _run(trainer, one, own, student_of, resume=resume)
            _keep(trainer, one, result, final=output_dir if one is plan[-1] else None)
        trained.append(result)
    if trained[-1].how == FINISHED_BEFORE:
        _load_student(trainer, trained[-1].folder)
    return trained, trainer


def _check_call(model: Any, trainer_class: Any, resume: Any) -> None:
    if not isinstance(model, nn.Module):
        raise SettingError(
            f"train_in_stages: model is a {type(model).__name__}. Give the student itself, a model: every stage goes "
            "on with it."
        )
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, DistillationMixin)):
        raise SettingError(
            f"train_in_stages: trainer_class={trainer_class!r}. Give DistillationTrainer, Seq2SeqDistillationTrainer, "
            "or a class of your own with DistillationMixin before its Trainer."
        )
    if not isinstance(resume, bool):
        raise SettingError(
            f"train_in_stages: resume_from_checkpoint={resume!r}. True or False: which stage, and which checkpoint of "
            "it, is found in output_dir."
        )


def _teachers(teacher_model: Any, model: Any, stages: Sequence[_Planned]) -> Callable[[_Planned], Any]:
    """The teacher of each stage; read once, with its tokenizer, where it is a folder or Hub id that a stage asks."""
    if not isinstance(teacher_model, (str, os.PathLike)) or not any(one.needs_teacher for one in stages):
        return lambda one: teacher_model
    kind = str(make_task(model, stages[0].keywords.get("task")))
    with random_state_kept():
        loaded = load_teacher(teacher_model, kind, dtype=setting(stages[0].args, "teacher_dtype"))
        tokenizer = find_tokenizer(teacher_model)
    return lambda one: _as_teacher(loaded, model, one, tokenizer)


def _as_teacher(teacher: Any, model: Any, one: _Planned, tokenizer: Any = None) -> Any:
    """As the trainer makes one of what it is given."""
    return as_teacher(
        teacher,
        str(make_task(model, one.keywords.get("task"))),
        processing_class=one.keywords.get("teacher_processing_class") or tokenizer,
        dtype=setting(one.args, "teacher_dtype"),
        label_matching=setting(one.args, "label_matching"),
    )


def _check_distillers(stages: Sequence[_Planned], model: Any, teacher_of: Callable[[_Planned], Any]) -> None:
    """What a later stage cannot do is said before the first one trains."""
    for one in stages:
        task, processor = (one.keywords.get(name) for name in ("task", "processing_class"))
        objectives, teacher = one.stage.make_objectives(), teacher_of(one)
        if compares_nothing(blend_of(one.args)["alpha"], objectives) and not one.needs_teacher:
            continue  # any class trains so
        try:
            asked = _as_teacher(teacher, model, one) if teacher is not None and one.needs_teacher else None
            Distiller(
                model, asked, task=task, processing_class=processor, objectives=objectives, seed=0, **blend_of(one.args)
            )
        except HfDistillError as error:
            raise type(error)(f"stage {one.stage.name!r}: {error}") from error


def _check_not_sharded(trainer: Any, plan: Sequence[_Planned]) -> None:
    kind = trainer.accelerator.distributed_type
    if len(plan) > 1 and kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise SettingError(
            f"train_in_stages with {kind.value}: a student that is sharded cannot be handed from stage to stage. Use "
            "data parallelism (DDP), or one program a stage: a DistillationTrainer that starts from the saved student."
        )


def _finished_before(one: _Planned) -> StageResult | None:
    found = record.read(one.folder, record.FINISHED)
    if found is None:
        return None
    history = found.pop("log_history")
    return StageResult(one.stage.name, one.folder, TrainOutput(**found), history, FINISHED_BEFORE)


def _run(trainer: Any, one: _Planned, settings: dict[str, Any], student_of: str | None, *, resume: bool) -> StageResult:
    """Train one stage, from where it is. `student_of`: the folder of a student that the model does not hold yet."""
    checkpoint = None
    if resume and not one.args.save_only_model:  # without the optimizer's state, only its start is exact
        checkpoint = last_whole_checkpoint(one.folder)
    if checkpoint is None and student_of is not None:
        _load_student(trainer, student_of)
    trainer.accelerator.wait_for_everyone()  # all have read what was there
    if trainer.args.should_save:
        record.write(one.folder, record.BEGUN, settings)
    output = trainer.train(resume_from_checkpoint=checkpoint)
    how = "trained" if checkpoint is None else "resumed"
    return StageResult(one.stage.name, one.folder, output, list(trainer.state.log_history), how)


def _load_student(trainer: Any, folder: str) -> None:
    """The weights alone: what objectives learned in another stage stays there."""
    with random_state_kept():
        trainer._load_student(os.path.join(folder, _STUDENT))


def _keep(trainer: Any, one: _Planned, result: StageResult, *, final: str | None) -> None:
    """Save the student, with a card, and then say that the stage is finished."""
    trainer.save_model(os.path.join(one.folder, _STUDENT), _internal_call=True)  # the flag: and do not push
    trainer.create_model_card(model_name=None if final is None else Path(final).absolute().name)
    if final is not None:
        trainer.save_model(final, _internal_call=True)
        card = Path(one.folder, CARD)
        if trainer.is_world_process_zero() and card.is_file():
            beside = Path(final, f".{CARD}.partial")
            shutil.copyfile(card, beside)
            os.replace(beside, Path(final, CARD))
    # Mixed precision wraps the forward; the next stage wraps it for itself.
    forget_preparation(trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        output = result.output
        record.write(one.folder, record.FINISHED, {**output._asdict(), "log_history": result.log_history})
    trainer.accelerator.wait_for_everyone()
    if final is not None and trainer.args.push_to_hub:
        trainer.push_to_hub()
