"""Whether what a cache holds can teach a student: task, tokenizer, decoder inputs, columns. Decided before training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from hf_distill.errors import TeacherError
from hf_distill.tasks import Task
from hf_distill.tasks.infer import unwrapped
from hf_distill.tasks.language import decoder_rule
from hf_distill.teachers import fitting
from hf_distill.teachers.cached import fingerprints
from hf_distill.teachers.cached.cache import TeacherCache
from hf_distill.teachers.cached.planning import task_settings
from hf_distill.vocabulary import Columns


def remembered(cache: TeacherCache) -> Any:
    """As much of the teacher as decides which columns of the heads mean the same."""
    config = dict(cache.manifest["teacher"]["config"])
    if config["id2label"] is not None:
        config["id2label"] = {int(index): name for index, name in config["id2label"].items()}
        config["label2id"] = {name: index for index, name in config["id2label"].items()}
    width = cache.manifest["predictions"]["columns"]
    return SimpleNamespace(
        config=SimpleNamespace(**config), lm_head=SimpleNamespace(weight=torch.empty(width, 0, device="meta"))
    )


def matched_columns(cache: TeacherCache, student: Any, task: Task, *, processor: Any, label_matching: str) -> Columns:
    """The columns that the student's head and the cache have in common.

    Raises:
        TeacherError: other labels or another vocabulary; or columns are listed that are not compared.
    """
    tokenizer = fitting.tokenizer_in(processor)
    known = cache.manifest["processor"] is not None  # then it is the student's, or was refused
    columns = fitting.matched_columns(
        student,
        remembered(cache),
        task,
        tokenizers=(tokenizer, tokenizer if known else None),
        label_matching=label_matching,
    )
    width = cache.manifest["predictions"]["columns"]
    if cache.store.lists_columns and columns.teacher not in (None, width):
        compared = columns.teacher
        raise TeacherError(
            f"the cache lists some of {width} columns, and student and teacher share "
            f"{compared if isinstance(compared, int) else 'some'} of them: what is listed may not be there. Build "
            "it with processing_class= (the student's tokenizer), or keep all: store=Dense()."
        )
    return columns


def known_columns(cache: TeacherCache, task: Task, *, processor: Any) -> Columns:
    """Of heads whose columns are not paired: over a vocabulary, those that each one's own tokenizer can write."""
    ours = fitting.known_columns(task, (fitting.tokenizer_in(processor), None))
    theirs = (cache.manifest["processor"] or {}).get("ids") if task.matched_by == "vocabulary" else None
    return Columns(ours.student, theirs)


def refuse_other_teacher(cache: TeacherCache, teacher: nn.Module) -> None:
    """Raises TeacherError: it is not the one that was asked."""
    there, now = cache.manifest["teacher"]["weights"], fingerprints.of_weights(teacher)
    if there != now:
        raise TeacherError(
            f"the cache was built with another teacher: its weights have the fingerprint {there} "
            f"({cache.manifest['teacher']['class']}), those of the teacher that is asked for "
            f"{now} ({type(unwrapped(teacher)).__name__}). Build a cache of this teacher, or ask for the other."
        )


def refuse_other_task(cache: TeacherCache, student: Any, task: Task, *, compares_predictions: bool) -> None:
    """Raises TeacherError: another kind of head, another pooling, or other decoder inputs.

    A teacher that makes its own decoder inputs has none that the student's could differ from.
    """
    there = cache.manifest["task"]
    now = {"kind": task.kind, **task_settings(task)}
    if compares_predictions and there["kind"] != now["kind"]:
        raise TeacherError(
            f"the cache holds the predictions of a {there['kind']} head, the student needs a teacher for "
            f"{task.kind}. Build a cache of a teacher with the student's kind of head."
        )
    if compares_predictions and there != now:
        raise TeacherError(
            f"the cache was built for another {task.kind} task: "
            f"{'; '.join(fingerprints.differences(there, now))}. Build it with student= or task= of this training."
        )
    rule, ours = cache.manifest["inputs"]["decoder"], decoder_rule(student)
    if rule is not None and "decoder_input_ids" not in cache.columns and ours != rule:
        raise TeacherError(
            f"the cache was built with other decoder inputs: labels 5, 6, 7 became {rule} there, the student makes "
            f"{ours} of them. Give the student the start and padding tokens of the cache, or build it again with "
            "student=."
        )


def refuse_other_tokenizer(cache: TeacherCache, processor: Any, task: Task, *, same_inputs: bool) -> None:
    """Raises TeacherError: positions are compared, and student and teacher were not given the same ones."""
    there = cache.manifest["processor"]
    now = fingerprints.of_processor(processor)
    if there is None or now is None or not same_inputs:
        return
    compared = [name for name in ("vocabulary", "tokenizer", "extractor") if name in there and name in now]
    before, after = ({name: side[name] for name in compared} for side in (there, now))
    if before != after:
        raise TeacherError(
            "the cache was built with another tokenizer or extractor than the student's: "
            f"{'; '.join(fingerprints.differences(before, after))}. Rows of a {task.kind} head are positions of "
            "the input, so both must read the same. Build a cache with the student's tokenizer."
        )
