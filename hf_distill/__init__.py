"""hf-distill: knowledge distillation for every head that the Hugging Face Trainer can train.

Public names are imported when they are first used, so that `import hf_distill` and the command line stay quick:
torch and transformers take seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_distill.blend import DistillerOutput, Step
    from hf_distill.distiller import Distiller
    from hf_distill.errors import (
        DataError,
        HfDistillError,
        MissingExtraError,
        SettingError,
        TeacherError,
        TrainingError,
    )
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
    from hf_distill.runs import Chain, Link, train_in_stages
    from hf_distill.tasks import Task
    from hf_distill.teachers import (
        BaseModelTeacher,
        CachedTeacher,
        Ensemble,
        ModelTeacher,
        MovingAverage,
        Peer,
        RDropTeacher,
        Snapshot,
        Teacher,
        TeacherCache,
        TemporalEnsemble,
    )
    from hf_distill.teachers.completions import generate_completions
    from hf_distill.trainer.arguments import DistillationArguments, Seq2SeqDistillationArguments
    from hf_distill.trainer.mixin import (
        DistillationMixin,
        DistillationTrainer,
        Seq2SeqDistillationTrainer,
    )

__version__ = "0.1.0.dev0"  # pyproject.toml reads it here

__all__ = [
    "AttentionMatch",
    "BaseModelTeacher",
    "CachedTeacher",
    "Chain",
    "CosineEmbedding",
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
    "RDropTeacher",
    "RelationMatch",
    "Seq2SeqDistillationArguments",
    "Seq2SeqDistillationTrainer",
    "SettingError",
    "SimilarityMatch",
    "Snapshot",
    "Stage",
    "Step",
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

# The imports above, for run time: tests/test_lazy_imports.py compares the two.
_MODULES = {
    "trainer.arguments": ("DistillationArguments", "Seq2SeqDistillationArguments"),
    "blend": ("DistillerOutput", "Step"),
    "runs": ("Chain", "Link", "train_in_stages"),
    "distiller": ("Distiller",),
    "errors": ("DataError", "HfDistillError", "MissingExtraError", "SettingError", "TeacherError", "TrainingError"),
    "layer_map": ("LayerMap",),
    "objectives": (
        *("AttentionMatch", "CosineEmbedding", "ExitMatch", "HiddenMatch", "RelationMatch", "SimilarityMatch"),
        "UniversalLogitMatch",
    ),
    "presets": ("Preset", "Stage"),
    "tasks": ("Task",),
    "teachers": (
        *("BaseModelTeacher", "CachedTeacher", "Ensemble", "ModelTeacher", "MovingAverage", "Peer", "RDropTeacher"),
        *("Snapshot", "Teacher", "TeacherCache", "TemporalEnsemble"),
    ),
    "teachers.completions": ("generate_completions",),
    "trainer.mixin": ("DistillationMixin", "DistillationTrainer", "Seq2SeqDistillationTrainer"),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name, or a submodule, when it is first used."""
    if name in _MODULE_OF:
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value
    module = f"{__name__}.{name}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # the submodule is there, and something that it imports is not
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
