"""Who speaks: anything that turns a batch into signals without gradient."""

from hf_distill.teachers.base import Teacher
from hf_distill.teachers.cached import CachedTeacher, Dense, TeacherCache, TopK
from hf_distill.teachers.ensemble import Ensemble
from hf_distill.teachers.load import load_teacher
from hf_distill.teachers.make import as_teacher
from hf_distill.teachers.model import ModelTeacher
from hf_distill.teachers.own import AdaptersOff, MovingAverage

__all__ = [
    "AdaptersOff",
    "CachedTeacher",
    "Dense",
    "Ensemble",
    "ModelTeacher",
    "MovingAverage",
    "Teacher",
    "TeacherCache",
    "TopK",
    "as_teacher",
    "load_teacher",
]
