"""A teacher that runs once: its predictions on the disk, found again by the content of each example."""

from hf_distill.teachers.cache.cache import TeacherCache, is_cache
from hf_distill.teachers.cache.hidden import KeepActivations
from hf_distill.teachers.cache.source import BuildOptions
from hf_distill.teachers.cache.stores import Dense, Hybrid, Sampled, TopK
from hf_distill.teachers.cache.teacher import CachedCollator, CachedTeacher

__all__ = [
    "BuildOptions",
    "CachedCollator",
    "CachedTeacher",
    "Dense",
    "Hybrid",
    "KeepActivations",
    "Sampled",
    "TeacherCache",
    "TopK",
    "is_cache",
]
