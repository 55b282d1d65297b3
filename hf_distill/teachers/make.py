"""A Teacher from whatever the user passed as `teacher_model`."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from hf_distill.errors import SettingError, TeacherError
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.cache import CachedTeacher, TeacherCache, is_cache
from hf_distill.teachers.load import as_dtype, find_tokenizer, load_teacher
from hf_distill.teachers.model import ModelTeacher
from hf_distill.teachers.quantised import check_quantization, quantised_teacher
from hf_distill.vocabulary import LabelMatching


def as_teacher(
    teacher_model: Any,
    kind: str,
    *,
    processing_class: Any = None,
    dtype: str | None = None,
    label_matching: LabelMatching = "by_name",
    quantization: Any = None,
    device_map: str | dict[str, Any] | None = None,
) -> Teacher:
    """A Teacher, from one, from a model, from a folder or Hub id, or from a cache (a `TeacherCache` or its folder).

    Args:
        kind: the student's kind of head.
        processing_class: the teacher's tokenizer, where it is not in the folder.
        dtype: as `load_teacher`; a model that is given is cast in place, once it is put to use.
        quantization: "int8_dynamic", or what `from_pretrained` takes as `quantization_config`, also as a dict.
        device_map: as `from_pretrained`.

    Raises:
        TeacherError: none of these, or it cannot be loaded.
        SettingError: quantization or device_map of what is not loaded here.
    """
    if isinstance(processing_class, (list, tuple)) and not isinstance(teacher_model, Teacher):
        raise SettingError(
            f"teacher_processing_class is a list of {len(processing_class)}, which is for an Ensemble: one for each of "
            "its teachers. Pass the one of this teacher."
        )
    from_path = isinstance(teacher_model, (str, os.PathLike)) and not is_cache(teacher_model)
    check_quantization(teacher_model, from_path=from_path, quantization=quantization, device_map=device_map)
    if quantization is not None:
        return quantised_teacher(
            teacher_model,
            kind,
            quantization=quantization,
            device_map=device_map,
            dtype=dtype,
            processing_class=processing_class or (find_tokenizer(teacher_model) if from_path else None),
            label_matching=label_matching,
        )
    if isinstance(teacher_model, nn.Module):
        model = teacher_model
    elif isinstance(teacher_model, TeacherCache) or (
        isinstance(teacher_model, (str, os.PathLike)) and is_cache(teacher_model)
    ):
        return CachedTeacher(teacher_model, label_matching=label_matching)
    elif isinstance(teacher_model, (str, os.PathLike)):
        model = load_teacher(teacher_model, kind, dtype=dtype, device_map=device_map)
        dtype = dtype if device_map is None or dtype is None else "auto"  # it has it, and cannot be cast where it lies
        processing_class = processing_class or find_tokenizer(teacher_model)
    elif isinstance(teacher_model, Teacher):
        teacher_model.configure(processing_class=processing_class, dtype=dtype, label_matching=label_matching)
        return teacher_model
    elif isinstance(teacher_model, (list, tuple)):
        raise TeacherError(
            f"teacher_model is a {type(teacher_model).__name__} of {len(teacher_model)}. Several teachers are one as "
            "teacher_model=Ensemble([...]) (hf_distill.Ensemble), which says how they are averaged."
        )
    else:
        raise TeacherError(
            f"teacher_model is a {type(teacher_model).__name__}. Allowed: a model, a folder or Hub id, or an object "
            "derived from hf_distill.Teacher."
        )
    return ModelTeacher(model, processing_class=processing_class, label_matching=label_matching, dtype=as_dtype(dtype))
