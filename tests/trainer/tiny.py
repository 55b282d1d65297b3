"""Tiny text classifiers, ragged examples, arguments and comparisons. Other heads: `tests.heads`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from datasets import IterableDataset
from torch import Tensor, nn
from transformers import Trainer

from hf_distill import DistillationArguments, DistillationMixin, DistillationTrainer
from tests.cheap import build_once

SIZE = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LENGTHS = (5, 2, 7, 3, 6, 4, 2, 8)
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
PLAIN_STEP = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 1.0}


@build_once
def bert(head: str = "SequenceClassification", *, seed: int = 0, dropout: float = 0.0, **changed: Any) -> Any:
    """Return a random `BertFor<head>`; the global random state does not change."""
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = tf.BertConfig(**{**SIZE, **dropouts, "num_labels": 3, **changed})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(tf, f"BertFor{head}")(config)
        for parameter in model.parameters():  # perturbed, biases too, so that predictions differ between examples
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def examples(count: int = 8, *, labels: int | None = 3) -> list[dict[str, Any]]:
    """Return examples of ragged token ids with `labels` classes in turn, or unlabelled."""
    made = []
    for i in range(count):
        length = LENGTHS[i % len(LENGTHS)]
        example: dict[str, Any] = {"input_ids": [1 + (5 * i + 3 * j) % 22 for j in range(length)]}
        if labels is not None:
            example["labels"] = i % labels
        made.append(example)
    return made


def padded(features: Sequence[Mapping[str, Any]], *, to: int | None = None) -> dict[str, Tensor]:
    """Collate: ids padded with 0, a mask, and every other column stacked."""
    longest = to or max(len(f["input_ids"]) for f in features)
    batch = {name: torch.tensor([f[name] for f in features]) for name in features[0] if name != "input_ids"}
    ids = [list(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features]
    mask = [[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), **batch}


def as_stream(rows: list[dict[str, Any]]) -> IterableDataset:
    """Return a `datasets` stream of these examples."""

    def generate() -> Iterator[dict[str, Any]]:
        yield from rows

    return IterableDataset.from_generator(generate)


def arguments(folder: Path | str, kind: Any = DistillationArguments, **changed: Any) -> Any:
    """Return arguments without reports, progress bars or checkpoints: two steps of plain SGD with batches of four."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, **QUIET, **PLAIN_STEP, "learning_rate": 0.1}
    return kind(output_dir=str(Path(folder) / "out"), **{**settings, **changed})


def make(folder: Path | str, student: Any, teacher: Any = None, **changed: Any) -> DistillationTrainer:
    """Return a `DistillationTrainer`; unknown keywords go to its arguments."""
    own = {*inspect.signature(Trainer.__init__).parameters, *inspect.signature(DistillationMixin.__init__).parameters}
    given: dict[str, Any] = {"train_dataset": examples(), "data_collator": padded}
    given.update({name: changed.pop(name) for name in list(changed) if name in own})
    args = given.pop("args", None) or arguments(folder, **changed)
    return DistillationTrainer(model=student, teacher_model=teacher, args=args, **given)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


def assert_moved(found: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
    """Assert that training changed the weights, so that comparing two runs is meaningful."""
    assert any(not torch.equal(found[name], start[name]) for name in start), "no weight has changed"


def update_difference(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> float:
    """Return the norm of the difference of two updates over the norm of the expected update."""
    apart = _norm(found[name] - expected[name] for name in expected)
    moved = _norm(expected[name] - start[name] for name in expected)
    assert moved > 0, "no weight has changed"
    return apart / moved


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.sqrt(sum((t.double() ** 2).sum() for t in tensors if t.is_floating_point())))


def never_called(model: Any) -> Any:
    """Return the same model, which fails if it is run."""

    def forward(*_: Any, **__: Any) -> Any:
        raise AssertionError("the teacher was run")

    model.register_forward_pre_hook(lambda *_: forward())
    return model


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² KL(teacher ‖ student) of each row, from the definition."""
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(student.double() / temperature, -1)
    return temperature**2 * (p * (p.log() - q.log())).sum(-1)


def messages_with(log: Any, words: str) -> list[str]:
    """Return the captured messages that contain these words."""
    return [record.getMessage() for record in log.records if words in record.getMessage()]
