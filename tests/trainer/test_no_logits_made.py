"""With `fused_loss=True` no whole logits are made: every tensor and every product of a training is checked.

Whether the results are right is tested in the other files here and in `tests/functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_distill import DistillationTrainer, Distiller
from hf_distill import fused_forward as without_logits
from hf_distill.models.output_head import POSITIONS
from tests.heads import HEADS, IGNORED, VOCABULARY, of_each_kind
from tests.trainer.logit_free import LARGE, WHOLE, counted_rows, few_rows_at_once
from tests.trainer.tiny import arguments

WIDTH, COLUMNS = 16, 401  # a vocabulary size that nothing else has, many times the models' width
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
# Two chunks, the workspace of a block of two rows, and vectors `[v]`: biases and their gradients.
ENOUGH = 20


class VocabularyTensors(TorchDispatchMode):
    """Intercepts every operation of forward and backward.

    Attributes:
        most_rows: of one tensor with the vocabulary as an axis, its elements / v. Weights are excluded.
        most_rows_alive: of all such tensors alive at once.
        multiplications: in all products with the vocabulary as an axis.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most_rows = self.most_rows_alive = 0.0
        self.multiplications = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0].rstrip("_") in PRODUCTS:
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            if COLUMNS in (*a.shape, *b.shape):
                self.multiplications += a.numel() * b.shape[-1]
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and COLUMNS in x.shape and sorted(x.shape) != [WIDTH, COLUMNS]:
                self._saw(x)
        return found

    def _saw(self, x: Tensor) -> None:
        self.most_rows = max(self.most_rows, x.numel() / COLUMNS)
        storage = x.untyped_storage()
        self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes() // x.element_size())
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.most_rows_alive = max(self.most_rows_alive, sum(size for _, size in self._alive.values()) / COLUMNS)


def seen_in(work: Callable[[], Any]) -> VocabularyTensors:
    with VocabularyTensors() as seen:
        work()
    return seen


@pytest.mark.parametrize("name", of_each_kind(5, LARGE))
def test_a_step_needs_only_chunks_and_four_products(monkeypatch, name: str) -> None:
    """Logits of both models, and two products for the gradients, over the rows that count."""
    few_rows_at_once(monkeypatch, COLUMNS)
    head = HEADS[name]
    student, teacher = (head.make(seed, vocab_size=COLUMNS).train() for seed in (1, 2))
    batch = head.batch(30)
    rows = counted_rows(head, batch["labels"])
    assert 3 * ENOUGH < rows < batch["labels"].numel()  # otherwise the test proves little
    seen = []
    for fused in (False, True):
        distiller = Distiller(student, teacher, fused_loss=fused)
        distiller(student, batch)  # the trial of the head
        seen.append(seen_in(lambda d=distiller: d(student, batch).loss.backward()))
    plain, ours = seen
    assert ours.most_rows == WHOLE and ours.most_rows_alive < ENOUGH
    assert ours.multiplications == 4 * rows * COLUMNS * WIDTH
    # Whole logits would have been detected.
    assert plain.most_rows == batch["labels"].numel() and plain.most_rows_alive > 4 * rows
    assert plain.multiplications > 4 * rows * COLUMNS * WIDTH


@pytest.mark.parametrize("name", of_each_kind(6, LARGE))
def test_a_whole_training_never_makes_logits(tmp_path, monkeypatch, name: str) -> None:
    """Including the trial of the head, counting, logging and the optimizer."""
    few_rows_at_once(monkeypatch, COLUMNS)
    head, seen = HEADS[name], []
    assert counted_rows(head, head.batch(30)["labels"]) > 2 * POSITIONS
    for fused in (False, True):
        trainer = DistillationTrainer(
            model=head.make(1, vocab_size=COLUMNS),
            teacher_model=head.make(2, vocab_size=COLUMNS),
            args=arguments(
                tmp_path,
                fused_loss=fused,
                max_steps=2,
                per_device_train_batch_size=30,
                logging_steps=1,
                label_smoothing_factor=0.1,
            ),
            train_dataset=head.examples(60),
            data_collator=head.collate,
        )
        seen.append(seen_in(trainer.train))
    plain, ours = seen
    assert ours.most_rows <= POSITIONS and plain.most_rows > 4 * POSITIONS


@pytest.mark.parametrize(
    ("alpha", "frozen", "products"), [(0.5, False, 4), (1.0, False, 4), (0.0, False, 3), (0.5, True, 3), (0.0, True, 2)]
)
def test_unneeded_products_are_skipped(alpha: float, frozen: bool, products: int) -> None:
    """The teacher's logits without a teacher; the head's gradient if it is frozen."""
    head = HEADS["llama_causal_lm"]
    student, teacher = (head.make(seed, vocab_size=COLUMNS) for seed in (1, 2))
    student.train().lm_head.requires_grad_(not frozen)
    batch = head.batch(8)
    distiller = Distiller(student, teacher if alpha > 0 else None, alpha=alpha, fused_loss=True)
    distiller(student, batch)
    seen = seen_in(lambda: distiller(student, batch).loss.backward())
    assert seen.multiplications == products * counted_rows(head, batch["labels"]) * COLUMNS * WIDTH


def test_only_masked_positions_reach_the_head(monkeypatch) -> None:
    """At 15 % masking, exactly these positions of both models, in order."""
    head, given, at_heads = HEADS["bert_masked_lm"], [], []
    student, teacher = head.make(1).train(), head.make(2)
    ids = torch.randint(3, VOCABULARY, (8, 20))
    labels = torch.full_like(ids, IGNORED)
    for row in labels:
        row[torch.randperm(20)[:3]] = torch.randint(3, VOCABULARY, (3,))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    distiller = Distiller(student, teacher, fused_loss=True)
    distiller(student, batch)

    def spy(hidden: Tensor, *rest: Any, **keywords: Any) -> Any:
        given.append((hidden, keywords["teacher"].hidden, keywords["labels"].ids, keywords["row_weights"]))
        return fused(hidden, *rest, **keywords)

    fused = without_logits.fused_linear_distillation
    monkeypatch.setattr(without_logits, "fused_linear_distillation", spy)
    for model in (teacher, student):  # in call order
        model.cls.predictions.transform.register_forward_hook(lambda *called: at_heads.append(called[-1]))
    distiller(student, batch)
    ((ours, theirs, of_labels, weights),) = given
    masked = labels != IGNORED
    assert len(ours) == 24 and weights is None  # 15 % of 160
    for found, whole in ((theirs, at_heads[0]), (ours, at_heads[1]), (of_labels, labels)):
        assert torch.equal(found, whole[masked])
