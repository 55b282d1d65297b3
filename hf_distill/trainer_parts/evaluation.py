"""Evaluation: the plain task loss and the user's metrics, each example once; the teacher only when it is asked for."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import has_length

from hf_distill.arguments import setting
from hf_distill.inside.packing import PackingCheck
from hf_distill.signals import Needs
from hf_distill.tasks.infer import unwrapped
from hf_distill.tasks.unknown import UnknownTask
from hf_distill.trainer_parts.each_once import EachOnce, examples_counted
from hf_distill.trainer_parts.teacher_metrics import TeacherMetrics, TeacherPredictions

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object
logger = logging.getLogger(__name__)


class EvaluationMixin(_Trainer):
    """Evaluation steps on the student's columns, and with `evaluate_with_teacher` a second look with the teacher."""

    distiller: Any
    args: Any
    _teacher_metrics: TeacherMetrics | None = None
    _teacher_predictions: TeacherPredictions | None = None
    _warnings_given: frozenset[str] = frozenset()
    _evaluated_outputs: Any = None
    _packing: PackingCheck | None = None
    _loss_of_probabilities: Any
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
        with self._loss_of_probabilities(inputs):
            found = super().compute_loss(model, inputs, return_outputs=wants_outputs, num_items_in_batch=num_items)
        if not wants_outputs:
            return found
        loss, self._evaluated_outputs = found
        return found if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *rest: Any, **keywords: Any) -> Any:
        """As the trainer's own, on the student's columns; with `evaluate_with_teacher`, the teacher is asked too."""
        self._evaluated_outputs = None
        each_once = self.gather_function if isinstance(self.gather_function, EachOnce) else None
        if each_once is not None:
            each_once.begin(inputs)
        if not isinstance(self.distiller.task, UnknownTask):
            self._check_packing(inputs)
        found = super().prediction_step(model, self.distiller.student_inputs(inputs), *rest, **keywords)
        self._compare_with_teacher(model, inputs, found)
        self._evaluated_outputs = None
        if each_once is not None and found[0] is not None:
            each_once.loss_is_next()
        return found

    def _check_packing(self, inputs: Any) -> None:
        """As a training step does, of the models that are asked here: a loss of texts that see others is not theirs."""
        student = unwrapped(self.model)
        if self._packing is None or self._packing.student is not student:
            self._packing = PackingCheck(student)
        compares = self._compares(inputs)
        self._packing([inputs], self.distiller.task, self.distiller.teacher, Needs(logits=compares))
        if compares:
            self.distiller.check_padding([inputs], self.distiller.teacher, self.accelerator)

    def _compares(self, inputs: Any) -> bool:
        return self._teacher_metrics is not None and self.distiller.task.can_compare(inputs)

    @torch.no_grad()
    def _compare_with_teacher(self, model: Any, inputs: Any, found: Any) -> None:
        if self._teacher_metrics is None or not self._compares(inputs):
            return
        batch = self.distiller.prepare(self.distiller.with_task_labels(self._prepare_inputs(inputs)))
        outputs = self._evaluated_outputs
        if outputs is None:  # no labels, or generation: the forward that is compared has not been made
            outputs = model(**self.distiller.student_inputs(batch, labels=False))
        teacher = self._teacher_metrics.add(self.distiller, outputs, batch)
        if self._teacher_predictions is not None and found[2] is not None:
            self._teacher_predictions.add(self.distiller, teacher, outputs, found)

    def evaluation_loop(self, *positional: Any, **keywords: Any) -> Any:
        """As the trainer's own, each example once; `evaluate_with_teacher` adds what it says of the teacher.

        That is `teacher_agreement`, `divergence`, and a `teacher_<metric>` beside each metric of `compute_metrics`.
        """
        bound = inspect.signature(Trainer.evaluation_loop).bind(self, *positional, **keywords)
        bound.apply_defaults()
        asked = bound.arguments
        with self._each_example_once(asked["dataloader"]):
            if not setting(self.args, "evaluate_with_teacher"):
                return super().evaluation_loop(*positional, **keywords)
            prefix, loss_only = asked["metric_key_prefix"], asked["prediction_loss_only"]
            loss_only = self.args.prediction_loss_only if loss_only is None else loss_only
            with self._with_teacher(prefix, loss_only) as found:
                output = super().evaluation_loop(*positional, **keywords)
        measured = found.read(on_values=self.distiller.task.on_values)
        if not measured and output.num_samples:
            self._warn_once(
                f"evaluate_with_teacher=True: there is no {prefix}_divergence and nothing else of the teacher. No row "
                f"of these batches counts; a {self.distiller.task.kind} head may need labels to know its rows."
            )
        passed = found.passed()
        if passed is not None:
            self._warn_once(passed, "passed")
        named = {f"{prefix}_{name}": value for name, value in measured.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    @contextlib.contextmanager
    def _each_example_once(self, dataloader: Any) -> Iterator[None]:
        """In several processes, gather without the examples that fill up the last batches."""
        accelerator = self.accelerator
        gathers = getattr(self.gather_function, "func", self.gather_function)  # Trainer binds a setting to it
        keeps_all = gathers == accelerator.gather  # Seq2SeqTrainer's choice
        is_trainers = keeps_all or gathers == accelerator.gather_for_metrics
        alone = accelerator.num_processes == 1 or self.get_tp_size() > 1
        if alone or not is_trainers or self.args.eval_use_gather_object:
            yield
            return
        with examples_counted(dataloader) as counted:
            # As in one process, where nothing is cut off of a dataset without a length either.
            whole_batches = keeps_all or (counted is not None and not has_length(counted))
            self.gather_function = EachOnce(accelerator, counted, whole_batches=whole_batches)
            try:
                yield
            finally:
                self.gather_function = accelerator.gather_for_metrics

    @contextlib.contextmanager
    def _with_teacher(self, prefix: str, loss_only: bool) -> Iterator[TeacherMetrics]:
        """Ask the teacher about each batch, and compute the user's metrics of its predictions too."""
        gather = self.gather_function
        self._teacher_metrics = TeacherMetrics(
            gather if isinstance(gather, EachOnce) else self.accelerator.gather_for_metrics
        )
        compute_metrics, why_none = self.compute_metrics, None
        generates = isinstance(self, Seq2SeqTrainer) and self.args.predict_with_generate
        if compute_metrics is not None and not loss_only:
            if generates:
                why_none = "predict_with_generate=True: the metrics are of texts that only the student generates"
            elif self.args.batch_eval_metrics:
                why_none = "batch_eval_metrics=True: compute_metrics keeps sums of the student's batches"
            else:
                self._teacher_predictions = TeacherPredictions(self, gather, prefix)
                self.compute_metrics = self._teacher_predictions
        try:
            yield self._teacher_metrics
        finally:
            if self._teacher_predictions is not None:
                why_none = self._teacher_predictions.why_none
            self._teacher_metrics = self._teacher_predictions = None
            self.compute_metrics = compute_metrics
        if why_none is not None:
            self._warn_once(f"There is no {prefix}_teacher_<metric>: {why_none}.")

    def _warn_once(self, message: str, about: str | None = None) -> None:
        """Log a warning in the main process, unless it has been given (or another about the same)."""
        about = message if about is None else about
        if about not in self._warnings_given and self.is_world_process_zero():
            logger.warning(message)
        self._warnings_given |= {about}
