"""A second model that is trained along, each learning from the other: deep mutual learning."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor, nn

from hf_distill.errors import SettingError, TeacherError
from hf_distill.schedules import PROGRESS, Schedule, constant
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.infer import unwrapped
from hf_distill.teachers.base import StudentBatch, TeacherSetup
from hf_distill.teachers.model import ModelTeacher
from hf_distill.vocabulary import HeadAlignment

if TYPE_CHECKING:
    from hf_distill.objectives import Objective

_OF_CTC = "ctc_loss_reduction"


class Peer(ModelTeacher):
    """A model that teaches the student and learns from it at once, with an optimizer of its own: mutual learning.

    Zhang et al. 2018 (Deep Mutual Learning, section 2): each model's loss is its own on the labels, and the divergence
    of its predictions from the other's. The peer's loss is the student's with the roles exchanged: the same alpha,
    temperature and divergence, over the same denominators; labels by its head's own loss (label smoothing and a
    `compute_loss_func` of the trainer are the student's alone). Both learn from what the other says in training mode,
    before the step (the paper updates one model first and asks it again, which costs a forward more). Its forward is
    made once a micro-batch, with gradient. Weights and optimizer are saved with each checkpoint. It is no part of the
    student's export: `peer.model.save_pretrained(...)` keeps it.

    Args:
        model: any model that could teach the student; it is trained in place. `Ensemble([Peer(...), Peer(...)])`: the
            student learns from the mean of several, each of which learns from the student.
        optimizer: a class or function, called with the parameters and `lr=`.
        learning_rate: a number, or a schedule of progress; `linear(5e-5, 0.0)` is what `Trainer` does by itself.
        max_grad_norm: the norm that its gradient is clipped at, 0: not at all.
        processing_class: as `ModelTeacher`.
        label_matching: as `ModelTeacher`.

    Raises:
        SettingError: a learning rate below 0; fp16, FSDP, DeepSpeed; a peer that has learned beside another student.
        TeacherError: label ids that are not the student's: it learns from the labels of the batch as they are.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import Distiller
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> student, peer = Bert(config), Peer(Bert(config), learning_rate=0.1)
    >>> distiller = Distiller(student, peer, temperature=1.0)
    >>> before = peer.model.classifier.bias.clone()
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> distiller(student, batch).loss.backward()  # and the student's optimizer makes its step
    >>> distiller.end_step(student)
    >>> torch.equal(before, peer.model.classifier.bias)
    False
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        learning_rate: float | Schedule = 5e-5,
        max_grad_norm: float = 1.0,
        processing_class: Any = None,
        label_matching: str = "by_name",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise SettingError(f"Peer: model is a {type(model).__name__}. Load it, and pass the model: it is trained.")
        super().__init__(model, processing_class=processing_class, label_matching=label_matching)
        self.learning_rate = _checked_rate(learning_rate)
        self.max_grad_norm = max_grad_norm
        self._make_optimizer = optimizer
        self._optimizer: torch.optim.Optimizer | None = None
        self._steps = 0
        self._progress = 0.0
        self._held: tuple[Batch, Any] | None = None
        self._student: weakref.ref[nn.Module] | None = None

    def bind(self, setup: TeacherSetup) -> None:
        """Check that the two can teach each other. See `Teacher.bind`."""
        student, task = setup.student, setup.task
        if self._steps and (self._student is None or self._student() is not unwrapped(student)):
            raise SettingError("Peer: it has learned beside another student. Make a new one for a new student.")
        if not setup.compares_predictions:
            raise SettingError("Peer: nothing compares predictions, from which it learns. Give alpha above 0.")
        super().bind(setup)
        if not _same_ids(self.alignment):
            raise TeacherError(
                "Peer: its labels or tokens have other ids than the student's, and it learns from the labels of the "
                "batch as they are. Give both the same label2id, or the same tokenizer."
            )
        reductions = {getattr(getattr(unwrapped(m), "config", None), _OF_CTC, None) for m in (student, self.model)}
        if task.axis == "frames" and len(reductions) > 1:
            raise TeacherError(f"Peer: the student's {_OF_CTC} is not the peer's ({reductions}). Give both the same.")
        self._student = weakref.ref(unwrapped(student))

    def describe(self) -> str:
        return f"a peer ({type(unwrapped(self.model)).__name__}) that was trained along, by mutual learning"

    def check(self, needs: Needs, objectives: Iterable[Objective] = ()) -> None:
        if needs.activations:
            raise SettingError("Peer is compared by its predictions alone. Leave the objectives on the inside out.")

    def to(self, accelerator: Accelerator) -> None:
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise SettingError(
                f"Peer with {accelerator.distributed_type.value}: it is trained whole on each process. Use data "
                "parallelism (DDP)."
            )
        if getattr(accelerator, "mixed_precision", None) == "fp16":
            raise SettingError("Peer with fp16: its loss is not scaled, so its gradients would vanish. Use bf16.")
        super().to(accelerator)
        if accelerator.num_processes > 1:
            for parameter in self.model.parameters():
                broadcast(parameter.data, from_process=0)

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        self._put_to_use()
        if torch.is_grad_enabled():
            outputs = self._outputs(task, batch)
            self._held = batch, outputs
        else:
            with _in_evaluation(self.model):
                outputs = self._outputs(task, batch)
        return Signals(logits=self._predictions(outputs, task, batch).detach(), alignment=self.alignment)

    def on_batch(self, batch: StudentBatch) -> None:
        """Add the gradient of this micro-batch."""
        held, self._held = self._held, None
        # It was not asked where alpha is 0 at the moment: it learns from the labels all the same.
        outputs = held[1] if held and held[0] is batch.batch else self._outputs(batch.task, batch.batch)
        own = Signals(logits=self._predictions(outputs, batch.task, batch.batch), alignment=self.alignment)
        loss = batch.loss_of(outputs["loss"] if batch.uses_labels else None, own)
        if self._accelerator is not None:  # no `Accelerator.backward`, which divides by the steps it accumulates
            loss = loss / self._accelerator.gradient_accumulation_steps
        loss.backward()
        self._progress = batch.progress

    def on_step(self, student: nn.Module) -> None:
        """Its own step, by the gradients of all micro-batches and processes."""
        optimizer, parameters = self._stepping(), [p for p in self.model.parameters() if p.requires_grad]
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
        """Weights, what the optimizer remembers of them, and how many steps it made."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        found = {"steps": torch.tensor(self._steps), **{f"model.{name}": value for name, value in tensors.items()}}
        for index, kept in self._stepping().state_dict()["state"].items():
            for name, value in kept.items():
                if value is not None:
                    found[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
        return found

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises SettingError: of another model."""
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
                _, index, of = name.split(".", 2)
                kept.setdefault(int(index), {})[of] = tensor
        optimizer = self._stepping()
        optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})

    def _outputs(self, task: Task, batch: Batch) -> Any:
        inputs = self._model_inputs(batch)
        inputs |= {name: batch[name] for name in task.label_names if batch.get(name) is not None}
        if torch.is_grad_enabled():
            self.model.train()
        with self._forward_of(inputs, batch):
            return self.model(**inputs)

    def _stepping(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self._optimizer = self._make_optimizer(trained, lr=self.learning_rate(0.0))
        return self._optimizer

    def _put_to_use(self) -> None:
        self._in_use = True  # and not frozen


def _checked_rate(rate: float | Schedule) -> Schedule:
    if not callable(rate) and (isinstance(rate, bool) or not isinstance(rate, (int, float))):
        raise SettingError(
            f"Peer: learning_rate={rate!r}. Give a number of at least 0, or a function of progress 0 → 1."
        )
    schedule = rate if callable(rate) else constant(float(rate))
    for found in map(schedule, PROGRESS):
        if not 0 <= found < float("inf"):
            raise SettingError(f"Peer: learning_rate={found!r}: must be at least 0 and finite, at every moment.")
    return schedule


def _same_ids(columns: HeadAlignment) -> bool:
    ours, theirs = columns.student, columns.teacher
    return ours == theirs or not (isinstance(theirs, tuple) or isinstance(ours, tuple))


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
