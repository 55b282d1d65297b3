"""Each link's stages, arguments and keywords, checked before the first link trains."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hf_distill.chain import record
from hf_distill.chain.link import Link, named
from hf_distill.errors import SettingError
from hf_distill.presets.base import Stage
from hf_distill.stages.record import check_what_was_begun, described
from hf_distill.stages.settings import check_keywords, checked_stages, stage_arguments
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.trainer import DistillationMixin

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
    record.check_what_was_begun(str(args.output_dir), folders, resume=resume)
    plan = []
    for number, (link, folder) in enumerate(zip(links, folders, strict=True), 1):
        with named(link):
            stages = checked_stages(link.make_stages())
            own = dataclasses.replace(args, output_dir=folder)
            of_stages = stage_arguments(stages, own)
            given = _keywords_of(link, keywords, is_first=number == 1)
            check_keywords(stages, given, trainer_class)
            what = [described(stage, one) for stage, one in zip(stages, of_stages, strict=True)]
            check_what_was_begun(what, [str(one.output_dir) for one in of_stages], folder, resume=True)
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
