"""What objectives learn, in a `Trainer`: optimized and clipped with the student, alike on all processes, resumed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import Trainer

from hf_distill.arguments import setting
from hf_distill.errors import SettingError
from hf_distill.learned import STATE_FILE, load_state, save_state
from hf_distill.unused_outputs import forget_gradients_but

TEACHER_FILE = "distill_teacher.safetensors"

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class LearningMixin(_Trainer):
    """Trains `distiller.learned` with the student. Where nothing is learned it does nothing."""

    distiller: Any
    _micro_batches_left: int

    def create_optimizer(self, *positional: Any, **keywords: Any) -> Any:
        """As `Trainer`'s, with a group for what the objectives learn."""
        optimizer = super().create_optimizer(*positional, **keywords)
        learned = list(self.distiller.learned.parameters())
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [parameter for parameter in learned if id(parameter) not in held]
        if not missing:
            return optimizer
        if self.lr_scheduler is not None:
            raise SettingError(
                "the objectives learn projections, and the optimizer and the scheduler that were passed know nothing "
                "of them. Give the optimizer distiller.learned.parameters() too (pass distiller= to the trainer), or "
                "pass no scheduler."
            )
        group: dict[str, Any] = {"params": missing, "weight_decay": self.args.weight_decay}
        rate = setting(self.args, "projection_learning_rate")
        optimizer.add_param_group({**group, "lr": rate} if rate is not None else group)
        return optimizer

    def training_step(self, *positional: Any, **keywords: Any) -> Any:
        loss = super().training_step(*positional, **keywords)
        if self._micro_batches_left == 0:
            self.distiller.learned.synchronize(self.accelerator)
            if self.distiller.reached and self.model is not None and isinstance(self.model_wrapped, DDP):
                forget_gradients_but(self.model.parameters(), self.distiller.reached)
                self.distiller.reached = set()
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        return super()._clip_grad_norm(self._with_learned(model))

    def _get_grad_norm(self, model: Any, *positional: Any, **keywords: Any) -> Any:
        return super()._get_grad_norm(self._with_learned(model), *positional, **keywords)

    def _with_learned(self, model: Any) -> Any:
        return _Together(model, self.distiller.learned) if self.distiller.learned else model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.distiller.learned.save(output_dir)
            state = self._teacher_state()
            if state:
                save_state(state, output_dir, TEACHER_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.distiller.learned.load(resume_from_checkpoint)
        if self._teacher_state():
            self.distiller.teacher.load_state(
                load_state(resume_from_checkpoint, TEACHER_FILE, what="the moving teacher")
            )
        elif os.path.isfile(os.path.join(resume_from_checkpoint, TEACHER_FILE)):
            raise SettingError(
                f"{resume_from_checkpoint} was saved with a teacher that training changes (it has {TEACHER_FILE}), and "
                "this run's stays. Pass the same kind of teacher, or start anew from the saved student."
            )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best is not None and os.path.isfile(os.path.join(best, STATE_FILE)):
            self.distiller.learned.load(best)

    def _teacher_state(self) -> dict[str, Any]:
        """Of a teacher that training changes (an average of students); empty for one that stays."""
        state = getattr(self.distiller.teacher, "state", None)
        return {} if state is None else state()


class _Together:
    """The parameters of the student and of what is learned, for a norm over both."""

    def __init__(self, model: Any, learned: Any) -> None:
        self._model, self._learned = model, learned

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain(self._model.parameters(), self._learned.parameters())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
