"""A Teacher from whatever the user passed as `teacher_model`."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from hf_distill.errors import TeacherError
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.cached import CachedTeacher, TeacherCache, is_cache
from hf_distill.teachers.load import as_dtype, find_tokenizer, load_teacher
from hf_distill.teachers.model import ModelTeacher


def as_teacher(
    teacher_model: Any,
    kind: str,
    *,
    processor: Any = None,
    dtype: str | None = None,
    label_matching: str = "by_name",
) -> Teacher:
    """A Teacher, from one, from a model, from a folder or Hub id, or from a cache (a `TeacherCache` or its folder).

    Args:
        kind: the student's kind of head. processor: the teacher's tokenizer, where it is not in the folder.
        dtype: as `load_teacher`; a model that is given is cast in place, once it is put to use.

    Raises:
        TeacherError: none of these, or it cannot be loaded.
    """
    if isinstance(teacher_model, nn.Module):
        model = teacher_model
    elif isinstance(teacher_model, TeacherCache) or (
        isinstance(teacher_model, (str, os.PathLike)) and is_cache(teacher_model)
    ):
        return CachedTeacher(teacher_model, label_matching=label_matching)
    elif isinstance(teacher_model, (str, os.PathLike)):
        model = load_teacher(teacher_model, kind, dtype=dtype)
        processor = processor or find_tokenizer(teacher_model)
    elif isinstance(teacher_model, Teacher):
        return teacher_model
    else:
        raise TeacherError(
            f"teacher_model is a {type(teacher_model).__name__}. Allowed: a model, a folder or Hub id, or an object "
            "with the methods of hf_distill.teachers.Teacher."
        )
    return ModelTeacher(
        model,
        processor=processor,
        label_matching=label_matching,
        dtype=as_dtype(dtype),
    )
