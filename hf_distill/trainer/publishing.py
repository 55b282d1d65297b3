"""Which files of a folder are the student's, and bringing them, each whole or not at all, to the output folder."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from hf_distill.functional import PROPERTIES
from hf_distill.hub import write_card as write_model_card
from hf_distill.hub.facts import (
    CardData,
    ModelFacts,
    ObjectiveFacts,
    ScheduleFacts,
    TrainingFacts,
    dataset_facts,
    evaluations_from_log,
    history_from_log,
    library_versions,
    looks_like_hub_id,
    model_facts,
    training_facts,
)
from hf_distill.schedules import Schedule
from hf_distill.tasks.infer import config_of, unwrapped
from hf_distill.teachers import Ensemble, ModelTeacher
from hf_distill.teachers.quantised import QuantisedTeacher
from hf_distill.trainer.arguments import setting

if TYPE_CHECKING:
    from hf_distill.trainer.mixin import DistillationMixin

# Files that only training needs.
_STATE_FILES = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "distill_*",
    "training_args.bin",
    "trainer_state.json",
)

CARD = "README.md"


def moved(source: str, target: str) -> list[str]:
    """Move the student's files one by one, each whole or not at all; returns their names."""
    files = _student_files(source)
    for name in files:
        os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
        # Before the file is in its place, where an upload in another thread may read it.
        content = _without_local_base(Path(source, name))
        if content is not None:
            Path(source, name).write_bytes(content)
        os.replace(os.path.join(source, name), os.path.join(target, name))
    return files


def copied(source: str, target: str) -> list[str]:
    """Copy the student's files one by one, each whole or not at all; returns their names."""
    files = _student_files(source)
    for name in files:
        goal = Path(target, name)
        goal.parent.mkdir(parents=True, exist_ok=True)
        beside = goal.with_name(f".{goal.name}.partial")
        content = _without_local_base(Path(source, name))
        beside.write_bytes(content) if content is not None else shutil.copyfile(Path(source, name), beside)
        os.replace(beside, goal)
    return files


def _without_local_base(file: Path) -> bytes | None:
    """Return an adapter's config without the local path of its base model; None for a file without such a path."""
    if file.name != "adapter_config.json":
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base or looks_like_hub_id(base):
        return None
    return json.dumps({**config, "base_model_name_or_path": None}, indent=2, sort_keys=True).encode()


def _student_files(folder: str) -> list[str]:
    """Return the files that `save_pretrained` of student and processor wrote, without the state of the training.

    Folders in a checkpoint are sharded optimizer states (`global_step5`, `optimizer_0`), except those of adapters
    and chat templates.
    """
    found = []
    for path in sorted(Path(folder).rglob("*")):
        inside = path.relative_to(folder)
        top = Path(inside.parts[0])
        is_state = any(top.match(pattern) for pattern in (*_STATE_FILES, "global_step*", "pytorch_model_fsdp*"))
        if path.is_file() and not is_state and inside.name not in ("latest", "zero_to_fp32.py", CARD):
            found.append(str(inside))
    return found


def write_card(
    trainer: DistillationMixin,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> None:
    """Write README.md into the output folder: teacher, student, temperature, alpha, objectives, measured metrics.

    The arguments are `Trainer.create_model_card`'s. `tasks` is ignored, since the student's head determines it;
    `dataset_tags` and `dataset` both name datasets, and a Hub name becomes a link.
    """
    if not trainer.is_world_process_zero():
        return
    facts = _card_data(
        trainer,
        name=model_name or Path(trainer.args.output_dir).absolute().name,
        language=_listed(language),
        license=license,
        tags=_listed(tags) + tuple(_listed(tasks)),
        base=finetuned_from,
        datasets=_listed(dataset) or _listed(dataset_tags),
    )
    write_model_card(facts, trainer.args.output_dir)


def _card_data(
    trainer: DistillationMixin,
    *,
    name: str,
    language: tuple[str, ...],
    license: str | None,
    tags: tuple[str, ...],
    base: str | None,
    datasets: tuple[str, ...],
) -> CardData:
    student = trainer.accelerator.unwrap_model(trainer.model)
    origin = getattr(config_of(student), "_name_or_path", None)
    match, task = trainer.distiller.logits_match, trainer.distiller.task
    divergence = match.name_for(task)
    _, properties = match.divergence_for(task)
    blending = trainer.distiller.blending
    has_teacher = trainer.distiller.teacher is not None
    asked = [n for n in blending.ever_active() if has_teacher or not blending.objectives[n].needs_teacher]
    has_teacher = has_teacher and any(blending.objectives[n].needs_teacher for n in asked)
    compares = "logits" in asked
    trained_on = tuple(
        fact
        for fact in ([dataset_facts(None, name=n) for n in datasets] or [dataset_facts(trainer.train_dataset)])
        if fact
    )
    if isinstance(trainer.eval_dataset, dict):
        evaluated: Any = {key: dataset_facts(value) for key, value in trainer.eval_dataset.items()}
    else:  # as in Trainer's card, a single named dataset also stands for the evaluation
        evaluated = dataset_facts(trainer.eval_dataset, name=datasets[0] if len(datasets) == 1 else None)
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    return CardData(
        name=name,
        task=str(task),
        student=model_facts(student),
        repo_id=trainer.hub_model_id,
        teachers=teacher_facts(trainer) if has_teacher else (),
        ensemble=trainer.distiller.teacher.describe() if isinstance(trainer.distiller.teacher, Ensemble) else None,
        base_model=base or (origin if looks_like_hub_id(origin) else None),
        processing_class=None if trainer.processing_class is None else type(trainer.processing_class).__name__,
        pooling=getattr(task, "pooling", None),
        divergence=divergence if compares else None,
        divergence_kwargs=match.divergence_kwargs if compares else {},
        temperature=_schedule(trainer, "temperature", match.temperature) if compares and properties.softens else None,
        temperature_power=PROPERTIES[divergence].temperature_power if divergence in PROPERTIES else 2,
        alpha=None if blending.alpha is None else _schedule(trainer, "alpha", blending.alpha),
        objectives=_objective_facts(trainer, asked),
        datasets=trained_on,
        evaluations=evaluations_from_log(trainer.state.log_history, evaluated, best_step=best),
        weights_step=best or trainer.state.global_step or None,
        history=history_from_log(trainer.state.log_history),
        training=_training_facts(trainer),
        versions=library_versions(),
        languages=language,
        license=license,
        tags=tags,
    )


def _training_facts(trainer: DistillationMixin) -> TrainingFacts:
    """Return the settings of the training; an optimizer and a schedule that the user passed have their own."""
    facts = training_facts(trainer.args, trainer.state)
    optimizer, schedule = trainer._given_optimizers
    if trainer.optimizer_cls_and_kwargs is not None:
        kind, settings = trainer.optimizer_cls_and_kwargs
        facts = replace(facts, optimizer=kind.__name__, learning_rate=settings.get("lr"))
    elif optimizer is not None:
        rate, decay = optimizer.defaults.get("lr"), optimizer.defaults.get("weight_decay")
        facts = replace(facts, optimizer=type(optimizer).__name__, learning_rate=rate, weight_decay=decay)
    if schedule is not None:
        facts = replace(facts, learning_rate_schedule=type(schedule).__name__, warmup=None)
    return facts if trainer._on_policy is None else replace(facts, extra={"on_policy": repr(trainer._on_policy)})


def _schedule(trainer: DistillationMixin, knob: str, schedule: Schedule) -> ScheduleFacts:
    """Return the schedule that was used, which is not in the arguments if the user gave a distiller."""
    start, end = schedule(0.0), schedule(1.0)
    if knob in trainer._blend_at_start:
        return ScheduleFacts(start=trainer._blend_at_start[knob], end=end, schedule="changed during the training")
    if start == end == schedule(0.5):
        return ScheduleFacts(start=start)
    kind = setting(trainer.args, f"{knob}_schedule")
    return ScheduleFacts(start=start, end=end, schedule=kind if trainer._blend_is_ours else "of the user's own")


def _objective_facts(trainer: DistillationMixin, asked: list[str]) -> tuple[ObjectiveFacts, ...]:
    """Return the terms with their weights at the start of training; alpha determines those of labels and logits."""
    blending = trainer.distiller.blending
    facts = [ObjectiveFacts("labels")] if trainer.distiller.uses_labels else []
    for name in asked:
        if name == "logits":
            facts.append(ObjectiveFacts(name))
        else:
            paper = blending.objectives[name].paper
            facts.append(ObjectiveFacts(name, blending.weight(name, 0.0), paper, blending.described(name)))
    return tuple(facts)


def teacher_facts(trainer: DistillationMixin) -> tuple[ModelFacts, ...]:
    """Return the facts of each teacher of an ensemble; for a teacher that is not a model, its description."""
    teacher, found = trainer.distiller.teacher, []
    for member in [] if teacher is None else teacher.members():
        if not isinstance(member, QuantisedTeacher) and type(member) is not ModelTeacher:
            kind = type(member).__name__
            found.append(ModelFacts(class_name=kind, description=member.describe(), paper=member.paper))
            continue
        assert isinstance(member, ModelTeacher)
        model = trainer.accelerator.unwrap_model(member.model)
        origin = getattr(config_of(model), "_name_or_path", None)
        if isinstance(member, QuantisedTeacher):  # the parameters of packed weights cannot be counted
            hub_id = origin if looks_like_hub_id(origin) else None
            found.append(ModelFacts(hub_id=hub_id, class_name=type(unwrapped(model)).__name__))
        else:
            found.append(model_facts(model, hub_id=origin))
    return tuple(found)


def push(
    trainer: DistillationMixin,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **kwargs: Any,
) -> CommitInfo | Future[CommitInfo] | None:
    """Upload the student, its processor and the card to `args.hub_model_id`, and nothing else.

    The arguments are `Trainer.push_to_hub`'s. Unlike `Trainer`, this does not upload training arguments (they
    hold local paths), logs, or other files in the output folder.
    """
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    token = token if token is not None else trainer.args.hub_token
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    # Saved into a separate folder first, to know which files are the student's.
    staged = os.path.join(trainer.args.output_dir, "_push")
    try:
        trainer.save_model(staged, _internal_call=True)  # the flag prevents another push
        if not trainer.is_world_process_zero():
            return None
        files = moved(staged, trainer.args.output_dir)
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(staged, ignore_errors=True)
    kwargs["tags"] = list(_listed(kwargs.get("tags"))) + list(getattr(trainer.model, "model_tags", None) or ())
    if kwargs.get("model_name") is None:
        kwargs["model_name"] = trainer.hub_model_id.split("/")[-1]
    trainer.create_model_card(**kwargs)
    trainer._finish_current_push()
    return _upload(
        trainer,
        files,
        commit_message,
        blocking=blocking,
        token=token,
        revision=revision or trainer.args.hub_revision,
    )


def push_from_checkpoint(trainer: DistillationMixin, checkpoint_folder: str) -> None:
    """Push during training by `hub_strategy`, which says whether whole checkpoints (optimizer included) go too."""
    if not trainer.is_world_process_zero() or trainer.args.hub_strategy == HubStrategy.END:
        return
    busy = trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()
    if busy and not trainer.args.hub_always_push:
        return
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    # Copied first: a rotation may delete the checkpoint while its upload still runs.
    files = copied(checkpoint_folder, trainer.args.output_dir)
    by_steps = trainer.args.save_strategy == SaveStrategy.STEPS
    moment = f"step {trainer.state.global_step}" if by_steps else f"epoch {int(trainer.state.epoch)}"
    message = f"Training in progress, {moment}"
    options = {"token": trainer.args.hub_token, "revision": trainer.args.hub_revision}
    jobs = [_upload(trainer, files, message, blocking=False, **options)]
    if trainer.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        last = trainer.args.hub_strategy == HubStrategy.CHECKPOINT
        name = "last-checkpoint" if last else Path(checkpoint_folder).name
        upload = partial(_upload_checkpoint, Path(checkpoint_folder), name, repo_id=trainer.hub_model_id, **options)
        jobs.append(HfApi().run_as_future(upload, commit_message=f"{message}, checkpoint"))
    if busy:
        trainer.push_in_progress.jobs.extend(jobs)
    else:
        trainer.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]  # its type hint is too narrow


def _upload_checkpoint(folder: Path, name: str, **options: Any) -> CommitInfo:
    """Upload a whole checkpoint under a name. The files on the disk, from which a run resumes, are not changed."""
    # The arguments hold hub_token in plain text and are not read on resume; PEFT's card holds paths.
    files = [path for path in folder.rglob("*") if path.is_file()]
    added = [
        CommitOperationAdd(f"{name}/{path.relative_to(folder).as_posix()}", _without_local_base(path) or path)
        for path in files
        if path.name not in ("training_args.bin", CARD)
    ]
    return HfApi().create_commit(operations=added, **options)


def _upload(
    trainer: DistillationMixin,
    files: list[str],
    message: str | None,
    *,
    blocking: bool,
    token: str | None,
    revision: str | None,
) -> CommitInfo | Future[CommitInfo]:
    upload: Any = HfApi().upload_folder  # its hints tell the two kinds of upload apart by literals
    return upload(
        repo_id=trainer.hub_model_id,
        folder_path=trainer.args.output_dir,
        allow_patterns=[*files, CARD],
        commit_message=message,
        token=token,
        run_as_future=not blocking,
        revision=revision,
    )


def _listed(value: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)
