"""Which checkpoints of a folder are whole (`Trainer` writes its state last), and their part of a distillation."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.trainer_utils import SaveStrategy

from hf_distill._types import State
from hf_distill.blend import LOGITS
from hf_distill.errors import SettingError
from hf_distill.hub.facts import ModelFacts
from hf_distill.learned import load_state, save_state
from hf_distill.schedules import PROGRESS
from hf_distill.trainer.publishing import teacher_facts
from hf_distill.trainer.settings import (
    FROM_CHECKPOINT,
    deciding_arguments,
    differences,
    plain,
    without_address,
)

if TYPE_CHECKING:
    from hf_distill.trainer.mixin import DistillationMixin

logger = logging.getLogger(__name__)
STATE = "trainer_state.json"
SETTINGS = "distill_settings.json"
TEACHER_FILE = "distill_teacher.safetensors"
_PREFIX = "checkpoint-"
_BLEND = ("alpha", "temperature", "divergence")


def checkpoints_in(folder: str) -> list[Path]:
    """Return the folders that `Trainer` takes for checkpoints, the last one first."""
    steps = {path: path.name.removeprefix(_PREFIX) for path in Path(folder).glob(f"{_PREFIX}*") if path.is_dir()}
    return sorted((path for path in steps if steps[path].isdigit()), key=lambda path: -int(steps[path]))


def is_whole(checkpoint: Path) -> bool:
    """Return whether it was written to the end."""
    try:
        return "global_step" in json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def last_whole_checkpoint(folder: str) -> str | None:
    """Return the last checkpoint that was written to the end."""
    return next((str(path) for path in checkpoints_in(folder) if is_whole(path)), None)


def checkpoint_to_resume(trainer: DistillationMixin, asked: str | bool | None) -> str | bool | None:
    """Return the checkpoint to resume from: the given one, or the last one that was written to the end.

    Raises:
        SettingError: if the given one was not, or none of those in the output folder.
    """
    if isinstance(asked, str | os.PathLike):
        if os.path.isdir(asked) and not is_whole(Path(asked)):
            raise SettingError(
                f"{asked} is no whole checkpoint: it has no readable {STATE}, which is written last. Saving it was "
                "cut off, or it is a folder of another kind. Resume from another one, or start from its model."
            )
        return str(asked)
    if asked is not True:
        return asked
    found = checkpoints_in(trainer.args.output_dir)
    whole = next((place for place, path in enumerate(found) if is_whole(path)), None)
    cut = [str(path) for path in found[:whole]]
    if not cut:
        return True if whole is None else str(found[whole])  # `Trainer` raises if there is none
    names = f"{', '.join(cut)} {'was' if len(cut) == 1 else 'were'} not written to the end (no readable {STATE})"
    if whole is None:
        raise SettingError(
            f"{names}, and {trainer.args.output_dir} has no other checkpoint. Start without resume_from_checkpoint."
        )
    if trainer.is_world_process_zero():
        logger.warning(f"{names}. The run goes on from {found[whole]}; delete what is cut off.")
    return str(found[whole])


def how_to_go_on(trainer: DistillationMixin) -> str:
    """Return a sentence on the checkpoint that the training can go on from."""
    step = f"The training has made {trainer.state.global_step} of {trainer.state.max_steps} steps."
    last = trainer._last_checkpoint
    if last is None or not is_whole(Path(last)):
        strategy = trainer.args.save_strategy
        why = {
            SaveStrategy.NO: "save_strategy='no' saves none",
            SaveStrategy.STEPS: f"one is saved each {trainer.state.save_steps} steps (save_steps)",
            SaveStrategy.EPOCH: "one is saved at the end of each epoch (save_strategy='epoch')",
            SaveStrategy.BEST: "one is saved at each best evaluation (save_strategy='best')",
        }[SaveStrategy(strategy)]
        return f"{step} It has saved no checkpoint to go on from: {why}."
    newest = last == last_whole_checkpoint(str(trainer.args.output_dir))
    how = "resume_from_checkpoint=True" if newest else f"resume_from_checkpoint={last!r}"
    alone = " The optimizer starts from nothing: save_only_model=True." if trainer.args.save_only_model else ""
    return f"{step} {how} goes on from {last}.{alone}"


def run_settings(trainer: DistillationMixin) -> State:
    """Return the settings that decide about the student, as JSON."""
    blending, found = trainer.distiller.blending, deciding_arguments(trainer.args)
    if not trainer._blend_is_ours:  # of the blend the arguments are not read
        found = {name: value for name, value in found.items() if not name.startswith(_BLEND)}
        moving = {} if blending.alpha is None else {"alpha": blending.alpha}
        for name, schedule in {**moving, "temperature": blending.logits_match.temperature}.items():
            values = [schedule(progress) for progress in PROGRESS[::50]]
            found[name] = values[0] if len(set(values)) == 1 else values
        found["divergence"] = blending.logits_match.name_for(trainer.distiller.task)
        found["divergence_kwargs"] = plain(blending.logits_match.divergence_kwargs)
    for name in blending.ever_active():
        if name != LOGITS:
            found[f"objectives.{name}"] = without_address(blending.described(name))
    teachers = [] if trainer.distiller.teacher is None else [_words(fact) for fact in teacher_facts(trainer)]
    found["teacher"] = "; ".join(teachers) or None
    found["on_policy"] = None if trainer._on_policy is None else without_address(repr(trainer._on_policy))
    found["processes"] = trainer.args.world_size
    return found


def save_distillation(trainer: DistillationMixin, checkpoint: str) -> None:
    """Write what a checkpoint needs of the distillation: learned parameters, a teacher that changes, settings."""
    trainer.distiller.learned.save(checkpoint)
    teacher = trainer.distiller.teacher
    state = {} if teacher is None else teacher.state_dict()
    if state:
        save_state(state, checkpoint, TEACHER_FILE)
    in_use = json.dumps(run_settings(trainer), indent=2)
    Path(checkpoint, SETTINGS).write_text(in_use, encoding="utf-8")


def load_distillation(trainer: DistillationMixin, checkpoint: str) -> None:
    """Continue with the learned parameters and the teacher of a checkpoint.

    Raises:
        SettingError: if it belongs to other objectives, or another kind of teacher.
    """
    trainer.distiller.learned.load(checkpoint)
    teacher = trainer.distiller.teacher
    if teacher is not None and teacher.state_dict():
        teacher.load_state_dict(load_state(checkpoint, TEACHER_FILE, what="the moving teacher"))
    elif Path(checkpoint, TEACHER_FILE).is_file():
        raise SettingError(
            f"{checkpoint} was saved with a teacher that training changes (it has {TEACHER_FILE}), and this run's "
            "stays. Pass the same kind of teacher, or start again from the saved student."
        )


def warn_of_other_settings(trainer: DistillationMixin, checkpoint: str) -> None:
    """Log the settings that differ from those of the checkpoint."""
    path = Path(checkpoint, SETTINGS)
    if not path.is_file() or not trainer.is_world_process_zero():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(run_settings(trainer)))
    found = list(differences(before, now))
    if not found:
        return
    kept = [name for name in FROM_CHECKPOINT if before.get(name) != now.get(name)]
    logger.warning(
        f"The run goes on from {checkpoint} with other settings: {'; '.join(found)}."
        + (f" The optimizer goes on with its own {', '.join(kept)}, from the checkpoint." if kept else "")
    )


def add_note(error: BaseException, message: str) -> None:
    """Log a message, and show it at the end of the error's traceback."""
    logger.warning(message)
    error.add_note(message)


def _words(fact: ModelFacts) -> str:
    size = "" if fact.parameters is None else f", {fact.parameters:,} parameters"
    return f"{fact.hub_id or fact.description or fact.class_name}{size}"
