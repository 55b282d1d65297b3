"""Who speaks: anything that turns a batch into signals without gradient."""

from hf_distill.teachers.base import StudentBatch, Teacher, TeacherSetup
from hf_distill.teachers.cache import (
    BuildOptions,
    CachedTeacher,
    Dense,
    Hybrid,
    KeepActivations,
    Sampled,
    TeacherCache,
    TopK,
)
from hf_distill.teachers.ensemble import Ensemble
from hf_distill.teachers.load import load_teacher
from hf_distill.teachers.make import as_teacher
from hf_distill.teachers.model import ModelTeacher
from hf_distill.teachers.peer import Peer
from hf_distill.teachers.quantised import QuantisedTeacher, quantise_dynamically
from hf_distill.teachers.self_distillation import BaseModelTeacher, MovingAverage, RDropTeacher, Snapshot
from hf_distill.teachers.served import ServedTeacher
from hf_distill.teachers.specialists import (
    Specialists,
    SpecialistSet,
    confusable_classes,
    specialist_head,
    specialist_set,
)
from hf_distill.teachers.temporal import TemporalEnsemble

__all__ = [
    "BaseModelTeacher",
    "BuildOptions",
    "CachedTeacher",
    "Dense",
    "Ensemble",
    "Hybrid",
    "KeepActivations",
    "ModelTeacher",
    "MovingAverage",
    "Peer",
    "QuantisedTeacher",
    "RDropTeacher",
    "Sampled",
    "ServedTeacher",
    "Snapshot",
    "SpecialistSet",
    "Specialists",
    "StudentBatch",
    "Teacher",
    "TeacherCache",
    "TeacherSetup",
    "TemporalEnsemble",
    "TopK",
    "as_teacher",
    "confusable_classes",
    "load_teacher",
    "quantise_dynamically",
    "specialist_head",
    "specialist_set",
]
