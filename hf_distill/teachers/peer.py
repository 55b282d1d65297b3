"""A second model that is trained with the student, each learning from the other: deep mutual learning."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor, nn

from hf_distill._types import ProcessingClass
from hf_distill.errors import SettingError, TeacherError
from hf_distill.models.generation import evaluating
from hf_distill.schedules import PROGRESS, Schedule, checked_schedule
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.infer import config_of, unwrapped
from hf_distill.teachers.base import StudentBatch, TeacherSetup
from hf_distill.teachers.model import ModelTeacher
from hf_distill.vocabulary import LabelMatching

if TYPE_CHECKING:
    from hf_distill.objectives import Objective

_CTC_REDUCTION = "ctc_loss_reduction"


class Peer(ModelTeacher):
    """A model that teaches the student and learns from it, with its own optimizer: mutual learning.

    Zhang et al. 2018 (Deep Mutual Learning, section 2): the loss of each model is its label loss and the divergence of
    its predictions from the other's. The peer's loss is the student's with the roles exchanged: the same alpha,
    temperature, divergence and denominators; its label loss is that of its own head (label smoothing and the trainer's
    `compute_loss_func` apply to the student only). Both models learn from the other's predictions in training mode,
    before the step (the paper updates one model first and runs it again, which costs another forward). The peer runs
    once a micro-batch, with gradient. Its weights and optimizer are saved with each checkpoint, but not exported with
    the student: save it with `peer.model.save_pretrained(...)`.

    With `Ensemble([Peer(...), Peer(...)])` the student learns from the mean of several peers, each of which learns from
    the student.

    Args:
        model: any model that could teach the student; it is trained in place.
        optimizer: a class or function, called with the parameters and `lr=`.
        learning_rate: a number, or a schedule of progress; `linear(5e-5, 0.0)` is `Trainer`'s default.
        max_grad_norm: the norm that its gradient is clipped to; 0 for no clipping.
        processing_class: as for `ModelTeacher`.
        label_matching: as for `ModelTeacher`.

    Raises:
        SettingError: if the learning rate is below 0, the run uses fp16, FSDP or DeepSpeed, or the peer was trained
            with another student.
        TeacherError: if its label ids are not the student's, since it learns from the labels of the batch.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import Distiller
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> student, peer = Bert(config), Peer(Bert(config), learning_rate=0.1)
    >>> distiller = Distiller(student, peer, temperature=1.0)
    >>> before = peer.model.classifier.bias.clone()
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> distiller(student, batch).loss.backward()  # then the student's optimizer steps
    >>> distiller.end_step(student)
    >>> torch.equal(before, peer.model.classifier.bias)
    False
    """

    paper = "zhang2018mutual"

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        learning_rate: float | Schedule = 5e-5,
        max_grad_norm: float = 1.0,
        processing_class: ProcessingClass | None = None,
        label_matching: LabelMatching = "by_name",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise SettingError(f"Peer: model is a {type(model).__name__}. Load it, and pass the model: it is trained.")
        super().__init__(model, processing_class=processing_class, label_matching=label_matching)
        self.learning_rate = _check_rate(learning_rate)
        self.max_grad_norm = max_grad_norm
        self._make_optimizer = optimizer
        self._optimizer: torch.optim.Optimizer | None = None
        self._steps = 0
        self._progress = 0.0
        self._last: tuple[Batch, Any] | None = None  # the last batch in training and its outputs
        self._student: weakref.ref[nn.Module] | None = None

    def __repr__(self) -> str:
        model, rate = type(unwrapped(self.model)).__name__, self.learning_rate(0.0)
        return f"Peer({model}, learning_rate={rate:g}, max_grad_norm={self.max_grad_norm:g})"

    def bind(self, setup: TeacherSetup) -> None:
        """Check that both models can teach each other. See `Teacher.bind`."""
        student, task = setup.student, setup.task
        if self._steps and (self._student is None or self._student() is not unwrapped(student)):
            raise SettingError("Peer: it has learned beside another student. Make a new Peer for a new student.")
        if not setup.compares_predictions:
            raise SettingError("Peer: nothing compares predictions, from which it learns. Give alpha above 0.")
        super().bind(setup)
        ours, theirs = self.alignment.student, self.alignment.teacher
        if ours != theirs and (isinstance(ours, tuple) or isinstance(theirs, tuple)):
            raise TeacherError("Peer: its labels or tokens have other ids than the student's. Give both the same ids.")
        reductions = {getattr(config_of(model), _CTC_REDUCTION, None) for model in (student, self.model)}
        if task.axis == "frames" and len(reductions) > 1:
            raise TeacherError(
                f"Peer: the student's {_CTC_REDUCTION} is not the peer's ({reductions}). Give both the same."
            )
        self._student = weakref.ref(unwrapped(student))

    def describe(self) -> str:
        return f"a peer ({type(unwrapped(self.model)).__name__}) trained with the student by mutual learning"

    def check(self, needs: Needs, objectives: Iterable[Objective] = ()) -> None:
        if needs.activations:
            raise SettingError("Peer is compared by its predictions alone. Leave out objectives on activations.")

    def to(self, accelerator: Accelerator) -> None:
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise SettingError(
                f"Peer with {accelerator.distributed_type.value}: it is trained whole on each process. Use DDP."
            )
        if accelerator.mixed_precision == "fp16":
            raise SettingError("Peer with fp16: its loss is not scaled, so its gradients would vanish. Use bf16.")
        super().to(accelerator)
        if accelerator.num_processes > 1:
            for parameter in self.model.parameters():
                broadcast(parameter.data, from_process=0)

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        if torch.is_grad_enabled():
            outputs = self._outputs(task, batch)
            self._last = batch, outputs
        else:
            with evaluating(self.model):
                outputs = self._outputs(task, batch)
        return Signals(logits=self._predictions(outputs, task, batch).detach(), alignment=self.alignment)

    def on_batch(self, batch: StudentBatch) -> None:
        """Add the gradient of this micro-batch."""
        last, self._last = self._last, None
        # While alpha is 0 the student does not run it, but it learns from the labels.
        outputs = last[1] if last and last[0] is batch.batch else self._outputs(batch.task, batch.batch)
        own = Signals(logits=self._predictions(outputs, batch.task, batch.batch), alignment=self.alignment)
        loss = batch.loss_of(outputs["loss"] if batch.uses_labels else None, own)
        if self._accelerator is not None:  # no `Accelerator.backward`, which divides by the steps it accumulates
            loss = loss / self._accelerator.gradient_accumulation_steps
        loss.backward()
        self._progress = batch.progress

    def on_step(self, student: nn.Module) -> None:
        """Step its own optimizer, with the gradients of all micro-batches and processes."""
        optimizer, parameters = self._get_optimizer(), [p for p in self.model.parameters() if p.requires_grad]
        accelerator = self._accelerator
        for parameter in parameters:
            if parameter.grad is not None and accelerator is not None and accelerator.num_processes > 1:
                parameter.grad.copy_(accelerator.reduce(parameter.grad, reduction="mean"))
        if self.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(self._progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._steps += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights, the optimizer's state, and the number of steps."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        state = {"steps": torch.tensor(self._steps), **{f"model.{name}": value for name, value in tensors.items()}}
        for index, values in self._get_optimizer().state_dict()["state"].items():
            for name, value in values.items():
                if value is not None:
                    state[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint; raise SettingError if it belongs to another model."""
        own = {name: value for name, value in self.state_dict().items() if name.startswith("model.")}
        theirs = {name: value for name, value in state.items() if name.startswith("model.")}
        if set(own) != set(theirs) or any(own[name].shape != value.shape for name, value in theirs.items()):
            raise SettingError("the saved peer is another model than this one. Resume with the same peer.")
        for name, value in own.items():
            value.copy_(theirs[name])
        self._steps = int(state["steps"])
        kept: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith("optimizer."):
                _, index, entry = name.split(".", 2)
                kept.setdefault(int(index), {})[entry] = tensor
        optimizer = self._get_optimizer()
        optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})

    def _outputs(self, task: Task, batch: Batch) -> Any:
        inputs = self._model_inputs(batch)
        inputs |= {name: batch[name] for name in task.label_names if batch.get(name) is not None}
        if torch.is_grad_enabled():
            self.model.train()
        with self._forward_of(inputs, batch):
            return self.model(**inputs)

    def _get_optimizer(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self._optimizer = self._make_optimizer(trained, lr=self.learning_rate(0.0))
        return self._optimizer

    def _freeze(self) -> None:
        """Do nothing: a peer is trained."""


def _check_rate(rate: float | Schedule) -> Schedule:
    """Return a learning rate as a schedule; raise SettingError if it is below 0 or infinite at some point."""
    schedule = checked_schedule("Peer: learning_rate", rate)
    for value in map(schedule, PROGRESS):
        if not 0 <= value < float("inf"):
            raise SettingError(f"Peer: learning_rate={value!r}: must be at least 0 and finite, at every moment.")
    return schedule
