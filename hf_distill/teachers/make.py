"""A Teacher from the user's `teacher_model`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_distill._types import Keywords
from hf_distill.errors import TeacherError
from hf_distill.teachers.base import Processors, Teacher, one_processor
from hf_distill.teachers.cache import CachedTeacher, TeacherCache, is_cache
from hf_distill.teachers.load import as_dtype, find_tokenizer, load_teacher
from hf_distill.teachers.model import ModelTeacher
from hf_distill.teachers.quantised import check_quantization, quantised_teacher
from hf_distill.vocabulary import LabelMatching


def as_teacher(
    teacher_model: Any,
    kind: str,
    *,
    processing_class: Processors = None,
    dtype: str | None = None,
    label_matching: LabelMatching = "by_name",
    quantization: str | Keywords | QuantizationConfigMixin | None = None,
    device_map: str | Keywords | None = None,
) -> Teacher:
    """Return a Teacher made from a model, a folder, a Hub id or a cache; a Teacher is returned as it is.

    Args:
        teacher_model: any of these; the folder may hold a model or a cache.
        kind: the kind of the student's head.
        processing_class: the teacher's tokenizer, if it is not in the folder.
        dtype: as for `load_teacher`; a model is cast in place before its first use.
        quantization: "int8_dynamic", or the `quantization_config` of `from_pretrained`, also as a dict.
        device_map: as for `from_pretrained`.

    Raises:
        TeacherError: if no teacher can be made of it, or it cannot be loaded.
        SettingError: if `quantization` or `device_map` is given for a teacher that is loaded already.
    """
    if isinstance(teacher_model, Teacher):
        check_quantization(teacher_model, quantization, device_map)
        teacher_model.configure(processing_class=processing_class, dtype=dtype, label_matching=label_matching)
        return teacher_model
    processor = one_processor(processing_class, "teacher")
    path = teacher_model if isinstance(teacher_model, (str, os.PathLike)) and not is_cache(teacher_model) else None
    check_quantization(teacher_model if path is None else None, quantization, device_map)
    if quantization is not None:
        return quantised_teacher(
            teacher_model,
            kind,
            quantization=quantization,
            device_map=device_map,
            dtype=dtype,
            processing_class=processor or (None if path is None else find_tokenizer(path)),
            label_matching=label_matching,
        )
    if path is not None:
        teacher_model = load_teacher(path, kind, dtype=dtype, device_map=device_map)
        dtype = dtype if device_map is None or dtype is None else "auto"  # loaded in this dtype; it cannot be cast
        processor = processor or find_tokenizer(path)
    match teacher_model:
        case nn.Module():
            return ModelTeacher(
                teacher_model, processing_class=processor, label_matching=label_matching, dtype=as_dtype(dtype)
            )
        case TeacherCache() | str() | os.PathLike():
            return CachedTeacher(teacher_model, label_matching=label_matching)
    name = type(teacher_model).__name__
    if isinstance(teacher_model, Sequence):
        raise TeacherError(f"teacher_model is a {name} of {len(teacher_model)}. Pass teacher_model=Ensemble([...]).")
    raise TeacherError(f"teacher_model is a {name}. Allowed: a model, a folder or Hub id, or a hf_distill.Teacher.")
