"""hf-distill: knowledge distillation for every head that the Hugging Face Trainer can train."""

from hf_distill.arguments import DistillationArguments, Seq2SeqDistillationArguments
from hf_distill.blend import DistillerOutput
from hf_distill.chain import Chain, Link
from hf_distill.counts import Counts
from hf_distill.distiller import Distiller
from hf_distill.errors import (
    DataError,
    HfDistillError,
    MissingExtraError,
    SettingError,
    TeacherError,
    TrainingError,
)
from hf_distill.hub import write_card
from hf_distill.layer_map import LayerMap
from hf_distill.objectives import (
    AttentionMatch,
    CosineEmbedding,
    ExitMatch,
    HiddenMatch,
    RelationMatch,
    SimilarityMatch,
    UniversalLogitMatch,
)
from hf_distill.presets import Preset, Stage
from hf_distill.stages import train_in_stages
from hf_distill.tasks import Task
from hf_distill.teachers import (
    AdaptersOff,
    CachedTeacher,
    Ensemble,
    ModelTeacher,
    MovingAverage,
    Peer,
    SecondPass,
    Snapshot,
    Teacher,
    TeacherCache,
    TemporalEnsemble,
)
from hf_distill.teachers.completions import generate_completions
from hf_distill.trainer import (
    DistillationMixin,
    DistillationTrainer,
    Seq2SeqDistillationTrainer,
)

# The trainer and the card do not know each other; they meet here.
DistillationMixin.card_renderer = write_card

__all__ = [
    "AdaptersOff",
    "AttentionMatch",
    "CachedTeacher",
    "Chain",
    "CosineEmbedding",
    "Counts",
    "DataError",
    "DistillationArguments",
    "DistillationMixin",
    "DistillationTrainer",
    "Distiller",
    "DistillerOutput",
    "Ensemble",
    "ExitMatch",
    "HfDistillError",
    "HiddenMatch",
    "LayerMap",
    "Link",
    "MissingExtraError",
    "ModelTeacher",
    "MovingAverage",
    "Peer",
    "Preset",
    "RelationMatch",
    "SecondPass",
    "Seq2SeqDistillationArguments",
    "Seq2SeqDistillationTrainer",
    "SettingError",
    "SimilarityMatch",
    "Snapshot",
    "Stage",
    "Task",
    "Teacher",
    "TeacherCache",
    "TeacherError",
    "TemporalEnsemble",
    "TrainingError",
    "UniversalLogitMatch",
    "generate_completions",
    "train_in_stages",
]
