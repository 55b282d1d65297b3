"""DistillationTrainer: `Trainer` whose loss also listens to a teacher. It holds no mathematics.

`DistillationMixin` goes before any `Trainer` subclass: `class Mine(DistillationMixin, MyTrainer)`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Seq2SeqTrainer, Trainer

from hf_distill.arguments import blend_of, setting
from hf_distill.distiller import Counts, Distiller
from hf_distill.errors import SettingError
from hf_distill.tasks import make_task
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.teachers import as_teacher
from hf_distill.trainer_parts.collation import RAW, TeacherInputsCollator
from hf_distill.trainer_parts.publishing import PublishingMixin
from hf_distill.trainer_parts.running_terms import RunningTerms
from hf_distill.trainer_parts.teacher_metrics import TeacherMetrics

_Trainer = Trainer if TYPE_CHECKING else object
_POSITIONAL = tuple(inspect.signature(Trainer.__init__).parameters)[3:]  # after self, model, args


class DistillationMixin(PublishingMixin, _Trainer):
    """Everything that a `Trainer` accepts, with the same meaning, and a teacher.

    Args:
        teacher_model: a model, a folder, a Hub id, or a `Teacher`; not needed where alpha is 0.
        teacher_processing_class: the teacher's tokenizer or feature extractor, where it is not the student's.
        task: a name in `hf_distill.tasks.TASKS` or a Task; None: from the student's class.
        distiller: full control: a `Distiller` built by you for this student. Then `teacher_model` and the settings of
            the blend in `args` are not read.

    Raises:
        SettingError, TeacherError, DataError: before anything is written.
    """

    # The terms already are divided by the counts of the whole optimizer step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *positional: Any,
        teacher_model: Any = None,
        teacher_processing_class: Any = None,
        task: Any = None,
        distiller: Distiller | None = None,
        **keywords: Any,
    ) -> None:
        given = dict(zip(_POSITIONAL, positional, strict=False)) | keywords
        _refuse_data_parallel(args)
        self._teacher_processor = teacher_processing_class
        self._task_setting = task
        self._teacher_setting = teacher_model
        self._counts: Counts | None = None
        self._micro_batches_left = 0
        self._begins_step = True
        self._terms = RunningTerms()
        self._teacher_metrics: TeacherMetrics | None = None
        self._evaluated_outputs: Any = None
        # With a model at hand everything is checked before Trainer makes a folder or a repository; what
        # this draws from the random generators is undone by Trainer's own seeding.
        if model is not None:
            self.distiller = distiller or self._make_distiller(
                model, args, given.get("processing_class")
            )
            _refuse_unlabelled(self.distiller, given)
        fresh_folder = args is not None and not os.path.exists(args.output_dir)
        super().__init__(model, args, *positional, **keywords)
        try:
            self._finish_init(model, distiller)
        except ValueError:
            if (
                fresh_folder
                and os.path.isdir(self.args.output_dir)
                and not os.listdir(self.args.output_dir)
            ):
                os.rmdir(self.args.output_dir)
            raise

    def _finish_init(self, model: Any, distiller: Distiller | None) -> None:
        _refuse_data_parallel(self.args)
        _refuse_sequence_parallel(self)
        if model is None:
            with _random_state_kept():
                self.distiller = distiller or self._make_distiller(
                    self.model, self.args, self.processing_class
                )
        self.distiller.place(self.accelerator)
        if self._teacher_processor is not None or self._has_teacher_columns():
            self.data_collator = TeacherInputsCollator(self.data_collator, self._teacher_processor)

    def _make_distiller(self, student: Any, args: Any, processing_class: Any) -> Distiller:
        blend = blend_of(args)
        alphas = [blend["alpha"](step / 10) for step in range(11)]
        teacher = None
        if self._teacher_setting is not None and (
            max(alphas) > 0 or setting(args, "evaluate_with_teacher")
        ):
            teacher = as_teacher(
                self._teacher_setting,
                make_task(student, self._task_setting).kind,
                processor=self._teacher_processor,
                dtype=setting(args, "teacher_dtype"),
                label_matching=setting(args, "label_matching"),
            )
        elif setting(args, "evaluate_with_teacher"):
            raise SettingError("evaluate_with_teacher=True needs a teacher: pass teacher_model=.")
        return Distiller(
            student, teacher, task=self._task_setting, processing_class=processing_class, **blend
        )

    # Data: which columns reach the models.

    def _has_teacher_columns(self) -> bool:
        datasets = [self.train_dataset, *_each(self.eval_dataset)]
        columns = [name for data in datasets for name in getattr(data, "column_names", None) or ()]
        return any(name.startswith(TEACHER_PREFIX) for name in columns)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is not None:
            return
        super()._set_signature_columns_if_needed()
        teacher = self.distiller.teacher
        if teacher is not None:
            own = [f"{TEACHER_PREFIX}{name}" for name in teacher.inputs]
            known = set(self._signature_columns)
            self._signature_columns += [n for n in (*teacher.inputs, *own, *RAW) if n not in known]

    # The loss.

    @property
    def _progress(self) -> float:
        return self.state.global_step / self.state.max_steps if self.state.max_steps > 0 else 0.0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of the next optimizer step, whose rows are counted before any forward."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._counts = self._count(batches)
            self._micro_batches_left = len(batches)
            self._begins_step = True
            self._single = len(batches) == 1
        return batches, num_items

    def _count(self, batches: list[Any]) -> Counts:
        return self.distiller.count(
            batches, self.accelerator, progress=self._progress, same_batch=self.get_tp_size()
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training, the blend; in evaluation, the plain task loss, as `Trainer`'s.

        Called outside of the training loop it takes the batch for a whole optimizer step.
        """
        distiller, progress = self.distiller, self._progress
        if not model.training:
            return self._evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        in_loop = self._counts is not None and self._micro_batches_left > 0
        counts = self._counts if in_loop else self._count([inputs])
        assert counts is not None
        batch = distiller.prepare(inputs, progress=progress)
        with_labels = distiller.alpha(progress) < 1
        student_inputs = distiller.student_inputs(batch, labels=with_labels)
        if with_labels:
            whole_step = self.accelerator.num_processes == 1 and (not in_loop or self._single)
            own = (
                num_items_in_batch if whole_step else self._own_num_items(batch, num_items_in_batch)
            )
            mean, outputs = super().compute_loss(model, student_inputs, True, own)
        else:
            mean, outputs = None, model(**student_inputs)
        scaled = self._labels_already_scaled(num_items_in_batch)
        found = distiller.blend(
            outputs,
            batch,
            counts,
            labels_mean=mean,
            labels_scale=1.0 if scaled else None,
            progress=progress,
        )
        if in_loop:
            self._micro_batches_left -= 1
            self._terms.add(found.terms, begins_step=self._begins_step)
            self._begins_step = False
        return (found.loss, outputs) if return_outputs else found.loss

    def _own_num_items(self, batch: Any, num_items_in_batch: Any) -> Any:
        """This micro-batch's number of items, by `Trainer`'s rule: the head's loss then is its own mean."""
        if num_items_in_batch is None:
            return None
        labels = batch.get("shift_labels")
        if labels is None:
            labels = batch["labels"][..., 1:] if self._loss_shifts_labels else batch["labels"]
        return labels.ne(-100).sum().clamp(min=1)

    def _labels_already_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether `Trainer.compute_loss` has multiplied by the number of processes (its own condition)."""
        passes_on = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        return bool(
            self.args.average_tokens_across_devices and passes_on and num_items_in_batch is not None
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`'s, with one figure a term beside `loss`, reduced over processes."""
        if "loss" in logs:
            logs = {
                "loss": logs["loss"],
                **self._terms.read(self.accelerator),
                **self._moving_knobs(),
                **logs,
            }
        super().log(logs, start_time)

    def _moving_knobs(self) -> dict[str, float]:
        knobs = {
            "alpha": self.distiller.alpha,
            "temperature": self.distiller.logits_match.temperature,
        }
        return {name: s(self._progress) for name, s in knobs.items() if s(0.0) != s(1.0)}

    # Evaluation.

    def _evaluation_loss(
        self, model: Any, inputs: Any, return_outputs: bool, num_items: Any
    ) -> Any:
        loss, outputs = super().compute_loss(
            model, self.distiller.student_inputs(inputs), True, num_items_in_batch=num_items
        )
        self._evaluated_outputs = outputs
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *rest: Any, **keywords: Any) -> Any:
        """As the trainer's own, on the student's columns; with `evaluate_with_teacher`, the teacher is asked too."""
        self._evaluated_outputs = None
        found = super().prediction_step(
            model, self.distiller.student_inputs(inputs), *rest, **keywords
        )
        if self._teacher_metrics is not None:
            self._compare_with_teacher(model, inputs)
        self._evaluated_outputs = None
        return found

    @torch.no_grad()
    def _compare_with_teacher(self, model: Any, inputs: Any) -> None:
        assert self._teacher_metrics is not None
        batch = self.distiller.prepare(self._prepare_inputs(inputs), progress=self._progress)
        outputs = self._evaluated_outputs
        if (
            outputs is None
        ):  # no labels, or generation: the forward that is compared has not been made
            outputs = model(**self.distiller.student_inputs(batch, labels=False))
        self._teacher_metrics.add(
            self.distiller,
            outputs,
            batch,
            progress=self._progress,
            gather=self.accelerator.gather_for_metrics,
        )

    def evaluation_loop(self, *positional: Any, **keywords: Any) -> Any:
        """As the trainer's own; `evaluate_with_teacher` adds `teacher_agreement` and `divergence`."""
        if setting(self.args, "evaluate_with_teacher"):
            self._teacher_metrics = TeacherMetrics()
        try:
            output = super().evaluation_loop(*positional, **keywords)
            if self._teacher_metrics is not None:
                bound = inspect.signature(Trainer.evaluation_loop).bind(
                    self, *positional, **keywords
                )
                bound.apply_defaults()
                prefix = bound.arguments["metric_key_prefix"]
                measured = self._teacher_metrics.read(on_values=self.distiller.task.on_values)
                output.metrics.update({f"{prefix}_{name}": x for name, x in measured.items()})
            return output
        finally:
            self._teacher_metrics = None

    # Hyperparameter search: a new student, new settings.

    def call_model_init(self, trial: Any = None) -> Any:
        """As `Trainer`'s; the distiller learns of the new student."""
        model = super().call_model_init(trial)
        if hasattr(self, "distiller"):
            self.distiller.fit(model)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if trial is not None:
            self.distiller.set_blend(**blend_of(self.args))


class DistillationTrainer(DistillationMixin, Trainer):
    """`Trainer` with a teacher. Change one line of a fine-tuning script, and get a distilled student.

    `loss = (1 - alpha) * labels + alpha * T^p * divergence`: each term a mean over the whole optimizer step (all accumulated
    micro-batches, all processes). `alpha=0` is `Trainer`; `alpha=1` needs no labels.

    Args: `Trainer`'s, and `DistillationMixin`'s.

    Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2. There the weights are free; here alpha is the teacher's,
    1 - alpha the labels'.

    >>> import tempfile, torch
    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import DistillationArguments, DistillationTrainer
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> args = DistillationArguments(
    ...     tempfile.mkdtemp(), alpha=0.9, max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True
    ... )
    >>> data = [{"input_ids": [1, 2], "labels": 0}, {"input_ids": [3, 4], "labels": 1}]
    >>> trainer = DistillationTrainer(
    ...     model=Bert(config), teacher_model=Bert(config), args=args, train_dataset=data
    ... )
    >>> trainer.train().global_step
    1
    """


class Seq2SeqDistillationTrainer(DistillationMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with a teacher: `predict_with_generate` and all. See `DistillationTrainer`."""


def _each(datasets: Any) -> list[Any]:
    return list(datasets.values()) if isinstance(datasets, dict) else [datasets]


def _refuse_data_parallel(args: Any) -> None:
    if args is not None and args.n_gpu > 1:
        raise SettingError(
            f"{args.n_gpu} GPUs in one process: that is DataParallel, which splits a batch behind the loss's back, and is refused. "
            f"Start one process a GPU instead: accelerate launch --num_processes {args.n_gpu} your_script.py. For one GPU, set "
            "CUDA_VISIBLE_DEVICES=0."
        )


def _refuse_sequence_parallel(trainer: Any) -> None:
    if trainer.get_cp_size() > 1 or trainer.get_sp_size() > 1:
        raise SettingError(
            "context or sequence parallelism: the rows of a sequence are then on different processes, which is not supported. "
            "Use data parallelism, FSDP or tensor parallelism."
        )


def _refuse_unlabelled(distiller: Distiller, given: dict[str, Any]) -> None:
    """Before training, where it can be known: a collator of the user's may still make the labels."""
    columns = getattr(given.get("train_dataset"), "column_names", None)
    if columns is None or given.get("data_collator") is not None or not distiller.needs_labels():
        return
    if given.get("compute_loss_func") is None and not {"label", "label_ids"} & set(columns):
        distiller.require_labels({name: name for name in columns})


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """What loads a model may draw random numbers; the training that follows must not see it."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
