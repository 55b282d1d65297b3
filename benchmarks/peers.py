"""Ways to get one blended loss from hidden rows and heads: ours, by hand, other libraries'. It measures nothing.

All take the labels' cross-entropy at one half and T² · forward KL at one half, mean over rows, at T = 2, except where
`labels` says that a way has no labels' term. Other libraries are used as they document it, and are never required.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_distill.functional.fused.inputs import Head, TeacherHidden, TeacherLogits, Terms
from hf_distill.functional.fused.loss import fused_linear_distillation

TEMPERATURE, HALF, CHUNK = 2.0, 0.5, 256


class Absent(Exception):
    """A library is not installed, or cannot run here; the text says which and why."""

    @classmethod
    def because(cls, package: str, why: object) -> Absent:
        """Of a library that could not be imported: not there, or it said this."""
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            return cls(f'{package} is not installed: pip install "hf-distill[peers]"')
        return cls(f"{package}: {next(iter(str(why).splitlines()), type(why).__name__)}")


@dataclass
class Rows:
    """What every way is given: `[n d]` hidden rows and `[v d]` heads of both sides, `[n]` labels."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    labels: Tensor

    @classmethod
    def drawn(
        cls, n: int, v: int, widths: tuple[int, int], dtype: torch.dtype, device: str = "cpu", *, seed: int = 0
    ) -> Rows:
        """Logits of standard deviation 3, as trained models have."""
        generator = torch.Generator().manual_seed(seed)

        def side(d: int) -> tuple[Tensor, Tensor]:
            rows, head = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator)
            return rows.to(device, dtype), head.mul_(3 / d**0.5).to(device, dtype)

        (student, head), (teacher, teacher_head) = side(widths[0]), side(widths[1])
        labels = torch.randint(0, v, (n,), generator=generator).to(device)
        return cls(student.requires_grad_(), head.requires_grad_(), teacher, teacher_head, labels)

    def as_double(self) -> Rows:
        """The same numbers in float64."""
        leaves = (self.student.detach().double().requires_grad_(), self.student_head.detach().double().requires_grad_())
        return Rows(*leaves, self.teacher.double(), self.teacher_head.double(), self.labels)

    def gathered(self, ids: Tensor) -> Rows:
        """The rows of these ids; gradients go back to all rows."""
        return replace(self, student=self.student[ids], teacher=self.teacher[ids], labels=self.labels[ids])


@dataclass(frozen=True)
class Way:
    """A way to the loss. `make` imports what it needs, or raises `Absent`; `prepare` runs outside of the clock."""

    make: Callable[[], Callable[[Rows], Tensor]]
    labels: bool = True
    prepare: Callable[[Rows], Rows] | None = None


def ours(rows: Rows, *, teacher: Any = None, labels: bool = True, compiled: bool | None = None) -> Tensor:
    """`fused_linear_distillation` with its own choice of chunks, and of whether to compile."""
    n = len(rows.labels)
    return fused_linear_distillation(
        rows.student,
        Head(rows.student_head),
        teacher=teacher or TeacherHidden(rows.teacher, Head(rows.teacher_head)),
        terms=Terms(temperature=TEMPERATURE, labels_factor=HALF / n, divergence_factor=HALF / n),
        labels=rows.labels if labels else None,
        compiled=compiled,
    ).loss


def with_given_logits(rows: Rows) -> Tensor:
    """Ours, with the teacher's logits made beforehand: in `teacher`."""
    return ours(rows, teacher=TeacherLogits(rows.teacher))


def teacher_logits_first(rows: Rows) -> Rows:
    """The teacher's logits in place of its hidden rows."""
    return replace(rows, teacher=rows.teacher @ rows.teacher_head.T)


def frozen_head(rows: Rows) -> Rows:
    """The student's head needs no gradient."""
    return replace(rows, student_head=rows.student_head.detach())


def total_by_hand(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """What people write, in fp32 (fp64 for fp64), as a sum over rows."""
    full = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher = student.to(full), teacher.to(full)
    q, p = (F.log_softmax(x / TEMPERATURE, -1) for x in (student, teacher))
    divergence = F.kl_div(q, p, reduction="sum", log_target=True)
    return HALF * F.cross_entropy(student, labels, reduction="sum") + HALF * TEMPERATURE**2 * divergence


def naive(rows: Rows) -> Tensor:
    """Whole logits of both sides."""
    with torch.no_grad():
        teacher = rows.teacher @ rows.teacher_head.T
    return total_by_hand(rows.student @ rows.student_head.T, teacher, rows.labels) / len(rows.labels)


def checkpointed(rows: Rows) -> Tensor:
    """Chunks whose logits are made again in the backward, by torch.utils.checkpoint."""

    def chunk(student: Tensor, head: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return total_by_hand(student @ head.T, teacher @ rows.teacher_head.T, labels)

    parts = zip(rows.student.split(CHUNK), rows.teacher.split(CHUNK), rows.labels.split(CHUNK), strict=True)
    total = rows.student.new_zeros((), dtype=torch.float32)
    for student, teacher, labels in parts:
        total = total + checkpoint(chunk, student, rows.student_head, teacher, labels, use_reentrant=False)
    return total / len(rows.labels)


def liger(*, compiled: bool) -> Callable[[Rows], Tensor]:
    """LigerFusedLinearJSD at β = 0, which is forward KL; T² goes into the weight."""
    module = _imported("liger_kernel.chunked_loss.jsd_loss", package="liger-kernel")
    loss = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=HALF,
        weight_soft_loss=HALF * TEMPERATURE**2,
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=compiled,
        chunk_size=CHUNK,
    )
    return lambda rows: loss(rows.student, rows.student_head, rows.teacher, rows.teacher_head, rows.labels)


def torchtune() -> Callable[[Rows], Tensor]:
    """ForwardKLWithChunkedOutputLoss and CEWithChunkedOutputLoss over eight chunks; without the teacher's entropy."""
    divergence = _file_of("torchtune", "modules/loss/kd_losses.py").ForwardKLWithChunkedOutputLoss()
    cross_entropy = _file_of("torchtune", "modules/loss/ce_chunked_output_loss.py").CEWithChunkedOutputLoss()

    def run(rows: Rows) -> Tensor:
        student = [(part @ rows.student_head.T)[None] for part in rows.student.chunk(8)]
        with torch.no_grad():
            teacher = [(part @ rows.teacher_head.T)[None] for part in rows.teacher.chunk(8)]
        softened = [part / TEMPERATURE for part in student], [part / TEMPERATURE for part in teacher]
        labels = rows.labels[None]
        return HALF * cross_entropy(student, labels) + HALF * TEMPERATURE**2 * divergence(*softened, labels)

    return run


def trl() -> Callable[[Rows], Tensor]:
    """The chunked divergence of TRL's DistillationTrainer at β = 0: no labels' term, but an entropy for its log."""
    module = _imported("trl.kernels.chunked_divergence", package="trl")

    def run(rows: Rows) -> Tensor:
        sides = (rows.student, rows.student_head, None, rows.teacher, rows.teacher_head, None)
        divergence, _ = module.ChunkedDivergenceFunction.apply(*sides, 0.0, TEMPERATURE)
        return HALF * TEMPERATURE**2 * divergence.mean()

    return run


def _imported(name: str, *, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise Absent.because(package, error) from error


def _file_of(package: str, path: str) -> ModuleType:
    """One file of a package, without the package: torchtune 0.6 as a whole imports what torchao has left behind."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise Absent.because(package, "not installed")
    file = Path(found.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(f"{package}_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise Absent.because(package, f"no file {path} in this version")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WAYS: dict[str, Way] = {
    "ours": Way(lambda: ours),
    "ours, compiled": Way(lambda: lambda rows: ours(rows, compiled=True)),
    "naive": Way(lambda: naive),
    "checkpoint-chunked": Way(lambda: checkpointed),
    "liger": Way(lambda: liger(compiled=False)),
    "liger, compiled": Way(lambda: liger(compiled=True)),
    "torchtune": Way(torchtune),
    "TRL (no labels)": Way(trl, labels=False),
    "ours, no labels": Way(lambda: lambda rows: ours(rows, labels=False), labels=False),
    "ours, teacher's logits given": Way(lambda: with_given_logits, prepare=teacher_logits_first),
    "ours, frozen head": Way(lambda: ours, prepare=frozen_head),
}


def reference(rows: Rows, *, labels: bool) -> tuple[Tensor, Tensor]:
    """Gradients at the student's hidden rows and head in float64, with whole logits."""
    exact = rows.as_double()
    student, teacher = exact.student @ exact.student_head.T, exact.teacher @ exact.teacher_head.T
    total = total_by_hand(student, teacher, exact.labels)
    if not labels:
        total = total - HALF * F.cross_entropy(student, exact.labels, reduction="sum")
    of_hidden, of_head = torch.autograd.grad(total / len(rows.labels), (exact.student, exact.student_head))
    return of_hidden, of_head
