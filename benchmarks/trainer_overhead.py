"""Seconds a step: DistillationTrainer, Trainer with a hand-written loss, a bare loop, interleaved. No accuracy.

The same student, teacher, batches and loss in all three: (1 - alpha) * cross-entropy + alpha * T² * KL. Blocks of a few
steps take turns within one process, so a machine that is busy for a while slows all three; set-up and the first steps
of a block are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when run as a script

import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_distill import DistillationArguments, DistillationTrainer

ALPHA, TEMPERATURE, LEARNING_RATE = 0.5, 2.0, 1e-4
STUDENT = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
TEACHER = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
TINY = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
BARE, HAND_WRITTEN, OURS = "bare loop", "Trainer, hand-written loss", "DistillationTrainer"
IGNORED = -100
Moment = tuple[float, float]
CLOCKS = ("wall clock", "processor time")


class Setting:
    """Models and batches. All ways train one and the same student: a copy elsewhere in memory can be slower."""

    def __init__(self, kind: str, *, batch: int, length: int, vocabulary: int, steps: int, tiny: bool) -> None:
        self.steps, self.batch = steps, batch
        shared = {"vocab_size": vocabulary, "max_position_embeddings": length, "num_labels": 4}
        model = BertForMaskedLM if kind == "token" else BertForSequenceClassification
        self.makes = {
            role: (model, BertConfig(**(TINY if tiny else sizes), **shared))
            for role, sizes in (("student", STUDENT), ("teacher", TEACHER))
        }
        torch.manual_seed(0)
        self.teacher = self.make("teacher").eval().requires_grad_(False)
        ids = torch.randint(5, vocabulary, (steps * batch, length))
        labels = torch.randint(0, 4, (steps * batch,))
        if kind == "token":  # 15 of 100 positions are predicted
            labels = torch.where(torch.rand(ids.shape) < 0.15, ids, IGNORED)
        mask = torch.ones_like(ids[0])
        self.examples = [
            {"input_ids": i, "attention_mask": mask, "labels": x} for i, x in zip(ids, labels, strict=True)
        ]

    def make(self, role: str) -> Any:
        model, config = self.makes[role]
        torch.manual_seed(1)
        return model(config)


def collate(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack: all examples have one length."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def hand_written_loss(student: Any, teacher: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """What a user would write: no more checks and no more figures than it takes."""
    outputs = student(**batch)
    with torch.no_grad():
        theirs = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    ours = outputs.logits
    if ours.dim() == 3:
        counted = batch["labels"] != IGNORED
        ours, theirs = ours[counted], theirs[counted]
    softened = F.log_softmax(ours / TEMPERATURE, -1), F.log_softmax(theirs / TEMPERATURE, -1)
    divergence = F.kl_div(*softened, log_target=True, reduction="batchmean") * TEMPERATURE**2
    return (1 - ALPHA) * outputs.loss + ALPHA * divergence, outputs


class HandWritten(Trainer):
    """The forty lines that people paste, kept short."""

    teacher: Any = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = hand_written_loss(model, self.teacher, inputs)
        return (loss, outputs) if return_outputs else loss


class StepTimes(TrainerCallback):
    """When each step begins. From one to the next: the step, the bookkeeping after it, and fetching the next batch."""

    def __init__(self) -> None:
        self.begins: list[Moment] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begins.append(now())


def now() -> Moment:
    """The wall's clock, and the processor time of this process, which stands still while others have the core."""
    return time.perf_counter(), time.process_time()


def differences(begins: Sequence[Moment], *, warm_up: int) -> list[Moment]:
    """Seconds of each step but the first few and the last, which no beginning follows, on both clocks."""
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(begins)][warm_up:]


def bare_block(setting: Setting, student: Any) -> list[Moment]:
    """One block of a loop with nothing but what training needs."""
    loader = torch.utils.data.DataLoader(setting.examples, setting.batch, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, fused=True)
    student.train()
    begins = []
    for batch in loader:
        begins.append(now())
        loss, _ = hand_written_loss(student, setting.teacher, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return begins


def trainer_block(setting: Setting, student: Any, *, ours: bool) -> list[Moment]:
    """One block of either Trainer; its set-up lies before the first step begins."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = dict(
            output_dir=folder,
            max_steps=setting.steps,
            per_device_train_batch_size=setting.batch,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=10,
        )
        given: dict[str, Any] = dict(
            model=student, train_dataset=setting.examples, data_collator=collate, callbacks=[times]
        )
        if ours:
            args = DistillationArguments(**common, alpha=ALPHA, temperature=TEMPERATURE)
            trainer: Trainer = DistillationTrainer(args=args, teacher_model=setting.teacher, **given)
        else:
            trainer = HandWritten(args=TrainingArguments(**common), **given)
            trainer.teacher = setting.teacher
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return times.begins


def measure(setting: Setting, *, blocks: int, warm_up: int) -> dict[str, list[list[Moment]]]:
    """Way → block → seconds of each step. The order within a round rotates."""
    student = setting.make("student")
    ways: list[tuple[str, Callable[[], list[Moment]]]] = [
        (BARE, lambda: bare_block(setting, student)),
        (HAND_WRITTEN, lambda: trainer_block(setting, student, ours=False)),
        (OURS, lambda: trainer_block(setting, student, ours=True)),
    ]
    found: dict[str, list[list[Moment]]] = {way: [] for way, _ in ways}
    for turn in range(blocks):
        for place in range(len(ways)):
            way, block = ways[(turn + place) % len(ways)]
            found[way].append(differences(block(), warm_up=warm_up))
    return found


def table(found: dict[str, list[list[Moment]]], *, clock: int) -> str:
    """Milliseconds a step, and ratios with their spread over the rounds, on one of the two clocks."""
    seconds = {way: [[step[clock] for step in block] for block in blocks] for way, blocks in found.items()}
    lines = [f"| {CLOCKS[clock]} | ms a step: p10 | median | p90 |", "| --- | ---: | ---: | ---: |"]
    for way, blocks in seconds.items():
        steps = [1000 * step for block in blocks for step in block]
        deciles = statistics.quantiles(steps, n=10, method="inclusive")
        lines.append(f"| {way} | {deciles[0]:.1f} | {median(steps):.1f} | {deciles[-1]:.1f} |")
    lines += [
        "",
        "| ratio | of the medians | median over rounds | quartiles over rounds |",
        "| --- | ---: | ---: | ---: |",
    ]
    for way, by in ((OURS, HAND_WRITTEN), (HAND_WRITTEN, BARE), (OURS, BARE)):
        rounds = [median(a) / median(b) for a, b in zip(seconds[way], seconds[by], strict=True)]
        whole = median(chain(*seconds[way])) / median(chain(*seconds[by]))
        quartiles = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else rounds * 3
        between = f"{quartiles[0]:.3f} to {quartiles[2]:.3f}"
        lines.append(f"| {way} / {by} | {whole:.3f} | {median(rounds):.3f} | {between} |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure, print the tables."""
    options = parse()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    gc.collect()
    gc.freeze()  # Accelerate collects garbage at the start of every training
    setting = Setting(
        options.kind,
        batch=options.batch,
        length=options.length,
        vocabulary=options.vocabulary,
        steps=options.steps + options.warm_up + 1,
        tiny=options.tiny,
    )
    found = measure(setting, blocks=options.blocks, warm_up=options.warm_up)
    if options.output:
        options.output.write_text(json.dumps({"options": {**vars(options), "output": None}, "seconds": found}))
    print(
        f"{options.kind}, {options.batch} x {options.length} tokens, vocabulary {options.vocabulary}, "
        f"{options.blocks} rounds of {options.steps} steps a way, {torch.get_num_threads()} thread(s)"
    )
    for clock in range(len(CLOCKS)):
        print(f"\n{table(found, clock=clock)}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("sequence", "token"), default="sequence", help="4 classes, or masked tokens")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="tokens an example")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--blocks", type=int, default=8, help="how often each way has its turn")
    parser.add_argument("--steps", type=int, default=10, help="steps counted in a block")
    parser.add_argument("--warm-up", type=int, default=2, help="steps at the start of a block that are not counted")
    parser.add_argument("--tiny", action="store_true", help="models of one layer, 16 wide: for trying out the script")
    parser.add_argument("--output", type=Path, help="JSON file for the seconds of every step")
    return parser.parse_args()


if __name__ == "__main__":
    main()
