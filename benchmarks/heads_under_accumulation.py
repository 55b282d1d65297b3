"""How large one update is when a batch of 8 is accumulated: every head, Trainer beside ours. No accuracy, no speed."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when run as a script

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_distill import DistillationArguments, DistillationTrainer
from tests.heads import HEADS, Head

EXAMPLES = 8
SPLITS = {"4x2": 2, "2x4": 4, "1x8": 8}  # micro-batch × accumulated, and how many are accumulated
NO_LABELS = "embedding"  # a kind of head without a loss of its own


def main() -> None:
    """Read the command line, measure, print the table."""
    options = parse()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    gc.freeze()  # Accelerate collects garbage at the start of every training
    lines = [
        "| head | task | `Trainer` 4x2 / 2x4 / 1x8 | ours, alpha=0 | ours, alpha=0.5 | ours: largest difference |",
        "| --- | --- | --- | --- | --- | ---: |",
    ]
    print("\n".join(lines))
    for name in options.heads:
        for line in rows_of(name, HEADS[name]):
            print(line, flush=True)


def rows_of(name: str, head: Head) -> list[str]:
    """The head's row; a head whose own loss depends on padding has one for each way to pad."""
    if not head.labels_see_padding:
        return [row(name, head, pad_to=None)]
    return [
        row(f"{name}, all padded alike", head, pad_to=head.longest),
        row(f"{name}, each micro-batch padded to its longest", head, pad_to=None),
    ]


def row(title: str, head: Head, *, pad_to: int | None) -> str:
    """One line of the table."""
    if head.kind == NO_LABELS:
        plain = zero = "-"
        blended, worst = ratios(head, alpha=1.0, pad_to=pad_to)
        blended += " (alpha=1)"
    else:
        plain, _ = ratios(head, alpha=None, pad_to=pad_to)
        zero, worst_zero = ratios(head, alpha=0.0, pad_to=pad_to)
        blended, worst = ratios(head, alpha=0.5, pad_to=pad_to)
        worst = max(worst, worst_zero)
    return f"| {title} | {head.kind} | {plain} | {zero} | {blended} | {worst:.0e} |"


def ratios(head: Head, *, alpha: float | None, pad_to: int | None) -> tuple[str, float]:
    """Sizes of the updates by that of 8×1, and the largest difference from it, relative; alpha None: `Trainer`."""
    whole = update(head, alpha=alpha, accumulated=1, pad_to=pad_to)
    found = [update(head, alpha=alpha, accumulated=k, pad_to=pad_to) for k in SPLITS.values()]
    sizes = [float(part.norm() / whole.norm()) for part in found]
    worst = max(float((part - whole).norm() / whole.norm()) for part in found)
    return " / ".join(f"{size:.3f}" for size in sizes), worst


def update(head: Head, *, alpha: float | None, accumulated: int, pad_to: int | None) -> torch.Tensor:
    """What one plain SGD step on the same 8 ragged examples changes in the weights, flat, in fp64."""
    student = head.make(seed=0).double()
    before = flat(student)

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = head.collate(examples, pad_to)
        return {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}

    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = dict(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=EXAMPLES // accumulated,
            gradient_accumulation_steps=accumulated,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            optim="sgd",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
        )
        given: dict[str, Any] = dict(model=student, train_dataset=head.examples(EXAMPLES), data_collator=collate)
        if alpha is None:
            trainer = Trainer(args=TrainingArguments(**common), **given)
        else:
            args = DistillationArguments(**common, alpha=alpha, temperature=2.0)
            teacher = head.make(seed=1).double() if alpha > 0 else None
            trainer = DistillationTrainer(args=args, teacher_model=teacher, **given)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return flat(student) - before


def flat(model: torch.nn.Module) -> torch.Tensor:
    """A copy of all weights that are trained, in one vector."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = list(HEADS)
    parser.add_argument("--heads", nargs="+", choices=names, default=names, metavar="HEAD", help=", ".join(names))
    return parser.parse_args()


if __name__ == "__main__":
    main()
