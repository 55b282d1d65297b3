"""Reading a checkpoint back whole: `Trainer` loads by name, and some models are saved under other names.

transformers 5 writes the tensors of ViT, for example, under their historical names. `from_pretrained` translates them;
`Trainer`'s resume and `load_best_model_at_end` do not, and go on from whatever weights the model held, with a warning.
Here the model's own rule is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from hf_distill._compat import renamed_state
from hf_distill.trainer_parts.random_state import random_state_kept

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class RestoringMixin(_Trainer):
    """Resume and the best model, for models whose checkpoint has other names than their state."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        _load_renamed(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            _load_renamed(self.model, self.state.best_model_checkpoint)


def _load_renamed(model: Any, checkpoint: str) -> None:
    with random_state_kept():
        state = renamed_state(model, checkpoint)
    if state is not None:
        model.load_state_dict(state, strict=True)
