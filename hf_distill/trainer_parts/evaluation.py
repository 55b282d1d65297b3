"""Evaluation: the plain task loss and the user's metrics; the teacher only when it is asked for."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from hf_distill.arguments import setting
from hf_distill.inside.packing import PackingCheck
from hf_distill.signals import Needs
from hf_distill.tasks.infer import unwrapped
from hf_distill.tasks.unknown import UnknownTask
from hf_distill.trainer_parts.teacher_metrics import TeacherMetrics

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class EvaluationMixin(_Trainer):
    """Evaluation steps on the student's columns, and with `evaluate_with_teacher` a second look with the teacher."""

    distiller: Any
    args: Any
    _teacher_metrics: TeacherMetrics | None = None
    _evaluated_outputs: Any = None
    _packing: PackingCheck | None = None
    _follow_settings: Any
    _collate_answer_masks: Any

    @property
    def _progress(self) -> float:
        """How much of the training is done, 0 → 1."""
        return self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0

    def get_eval_dataloader(self, *positional: Any, **keywords: Any) -> Any:
        """As the trainer's own, of data as they are: a collator that augments says what evaluates."""
        with self._ready_to_evaluate(*positional, *keywords.values()):
            return super().get_eval_dataloader(*positional, **keywords)

    def get_test_dataloader(self, *positional: Any, **keywords: Any) -> Any:
        """As `get_eval_dataloader`."""
        with self._ready_to_evaluate(*positional, *keywords.values()):
            return super().get_test_dataloader(*positional, **keywords)

    @contextlib.contextmanager
    def _ready_to_evaluate(self, *datasets: Any) -> Iterator[None]:
        self._follow_settings()
        self._collate_answer_masks(*(data for data in datasets if not isinstance(data, str)))
        kept, clean = self.data_collator, getattr(self.data_collator, "for_evaluation", None)
        self.data_collator = kept if clean is None else clean()
        try:
            yield
        finally:
            self.data_collator = kept

    def _evaluation_loss(self, model: Any, inputs: Any, return_outputs: bool, num_items: Any) -> Any:
        inputs = self.distiller.student_inputs(inputs)
        if isinstance(self.distiller.task, UnknownTask):
            return super().compute_loss(model, inputs, return_outputs, num_items)
        wants_outputs = return_outputs or self._teacher_metrics is not None
        if self.accelerator.num_processes > 1:  # else Trainer multiplies the loss by the processes, for most heads
            num_items = None
        found = super().compute_loss(model, inputs, return_outputs=wants_outputs, num_items_in_batch=num_items)
        if not wants_outputs:
            return found
        loss, self._evaluated_outputs = found
        return found if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *rest: Any, **keywords: Any) -> Any:
        """As the trainer's own, on the student's columns; with `evaluate_with_teacher`, the teacher is asked too."""
        self._evaluated_outputs = None
        if not isinstance(self.distiller.task, UnknownTask):
            self._check_packing(inputs)
        found = super().prediction_step(model, self.distiller.student_inputs(inputs), *rest, **keywords)
        self._compare_with_teacher(model, inputs)
        self._evaluated_outputs = None
        return found

    def _check_packing(self, inputs: Any) -> None:
        """As a training step does, of the models that are asked here: a loss of texts that see others is not theirs."""
        student = unwrapped(self.model)
        if self._packing is None or self._packing.student is not student:
            self._packing = PackingCheck(student)
        self._packing([inputs], self.distiller.task, self.distiller.teacher, Needs(logits=self._compares(inputs)))

    def _compares(self, inputs: Any) -> bool:
        return self._teacher_metrics is not None and self.distiller.task.can_compare(inputs)

    @torch.no_grad()
    def _compare_with_teacher(self, model: Any, inputs: Any) -> None:
        if self._teacher_metrics is None or not self._compares(inputs):
            return
        batch = self.distiller.prepare(self.distiller.with_task_labels(self._prepare_inputs(inputs)))
        outputs = self._evaluated_outputs
        if outputs is None:  # no labels, or generation: the forward that is compared has not been made
            outputs = model(**self.distiller.student_inputs(batch, labels=False))
        self._teacher_metrics.add(
            self.distiller,
            outputs,
            batch,
            gather=self.accelerator.gather_for_metrics,
        )

    def evaluation_loop(self, *positional: Any, **keywords: Any) -> Any:
        """As the trainer's own; `evaluate_with_teacher` adds `teacher_agreement` and `divergence`."""
        if not setting(self.args, "evaluate_with_teacher"):
            return super().evaluation_loop(*positional, **keywords)
        self._teacher_metrics = TeacherMetrics()
        try:
            output = super().evaluation_loop(*positional, **keywords)
            bound = inspect.signature(Trainer.evaluation_loop).bind(self, *positional, **keywords)
            bound.apply_defaults()
            prefix = bound.arguments["metric_key_prefix"]
            measured = self._teacher_metrics.read(on_values=self.distiller.task.on_values)
            named = {f"{prefix}_{name}": value for name, value in measured.items()}
            return output._replace(metrics={**(output.metrics or {}), **named})
        finally:
            self._teacher_metrics = None
