"""A teacher that is asked once: its predictions on the disk, found again by the content of each example."""

from hf_distill.teachers.cached.cache import TeacherCache, is_cache
from hf_distill.teachers.cached.collator import CachedCollator
from hf_distill.teachers.cached.hybrid import Hybrid
from hf_distill.teachers.cached.sampled import Sampled
from hf_distill.teachers.cached.stores import Dense
from hf_distill.teachers.cached.teacher import CachedTeacher
from hf_distill.teachers.cached.topk import TopK

__all__ = ["CachedCollator", "CachedTeacher", "Dense", "Hybrid", "Sampled", "TeacherCache", "TopK", "is_cache"]
