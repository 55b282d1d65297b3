"""A program: completions of a teacher, on-policy texts of a student, and another tokenizer, in several processes.

`test_causal_lm` starts it with FOLDER; each process writes its results there. In fp64 with plain SGD, so that only
real differences from one process are visible.
"""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DataCollatorForSeq2Seq
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hf_distill import TeacherError, UniversalLogitMatch, generate_completions
from hf_distill.augment import OnPolicy
from hf_distill.teachers.passes import ShardedPass
from tests.heads import HEADS
from tests.objectives import test_universal_logit as two_tokenizers
from tests.tiny_tokenizers import tokenizer
from tests.trainer.steps import in_double
from tests.trainer.tiny import make

LLAMA = HEADS["llama_causal_lm"]
GREEDY = 1e-7  # a sampling temperature at which the likeliest token is always drawn
SAMPLED = {"do_sample": True, "num_return_sequences": 2, "seed": 3}
# Prompts, prompts per shard, and further settings. With three shards the first process has two.
WRITTEN: dict[str, tuple[int, int, dict[str, Any]]] = {
    "a short last shard": (7, 3, {}),
    "fewer shards than processes": (2, 3, {}),
    "sampled": (7, 2, SAMPLED),
    "interrupted": (7, 1, SAMPLED),
}
# student_share, sampling temperature, and whether all prompts are equal.
POLICIES: dict[str, tuple[float, float, bool]] = {
    "never": (0.0, 1.0, False),
    "half, greedy": (0.5, GREEDY, False),
    "always, greedy": (1.0, GREEDY, False),
    "half, sampled": (0.5, 1.0, False),
    "always, sampled": (1.0, 1.0, True),
}
STEPS, ACCUMULATION = 3, 2


def writer(seed: int) -> Any:
    """Return a model whose texts have different lengths."""
    model = LLAMA.make(seed).double()
    with torch.no_grad():
        model.lm_head.weight[2] += 5 * model.lm_head.weight.std()
    return model


def completions(path: Path, case: str) -> dict[str, Any]:
    """Return the rows, and for each call the shards that this process wrote."""
    count, size, settings = WRITTEN[case]
    teacher, prompts = writer(2), datasets.Dataset.from_list(LLAMA.examples(count))
    calls: list[list[int]] = []
    write = ShardedPass.write_shard

    def noted(self: ShardedPass, shard: int, *rest: Any, **facts: Any) -> None:
        if case == "interrupted" and len(calls) == 1 and shard >= 3:
            raise KeyboardInterrupt
        calls[-1].append(shard)
        write(self, shard, *rest, **facts)

    def ask() -> Any:
        calls.append([])
        return generate_completions(
            teacher, prompts, path / case, max_new_tokens=6, batch_size=2, shard_examples=size, **settings
        )

    ShardedPass.write_shard = noted  # type: ignore[method-assign]  # put back below
    try:
        with contextlib.suppress(KeyboardInterrupt):
            ask()
        return {"rows": ask().to_list(), "calls": calls}
    finally:
        ShardedPass.write_shard = write  # type: ignore[method-assign]  # as it was


class RecordingOnPolicy(OnPolicy):
    """Records its arguments and results."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.shown: list[dict[str, Any]] = []

    def __call__(self, batch: Any, student: Any, **key: Any) -> Any:
        made = super().__call__(batch, student, **key)
        texts = [[token for token in row if token != -100] for row in made["labels"].tolist()]
        self.shown.append({**key, "continued": made is not batch, "texts": texts})
        return made


def whole(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: getattr(x, "full_tensor", lambda x=x: x)().detach().clone() for name, x in model.state_dict().items()}


def trained(folder: Path, student: Any, teacher: Any, *, examples_a_process: int, **settings: Any) -> dict[str, Any]:
    start = whole(student)
    trainer = make(
        folder, student, teacher, logging_steps=1, per_device_train_batch_size=examples_a_process,
        gradient_accumulation_steps=ACCUMULATION, train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    trainer.train()
    losses = [row for row in trainer.state.log_history if "loss" in row]
    logged = [{name: value for name, value in row.items() if name.startswith("loss")} for row in losses]
    return {"start": start, "weights": whole(student), "logged": logged}


def on_policy(folder: Path, case: str, *, examples_a_process: int, student: Any = None) -> dict[str, Any]:
    """Return three steps of a student that continues batches, and its texts."""
    student_share, temperature, same = POLICIES[case]
    view, rows = (
        RecordingOnPolicy(student_share=student_share, max_new_tokens=6, sampling_temperature=temperature),
        LLAMA.examples(24),
    )
    found = trained(
        folder, student or writer(1), LLAMA.make(2).double(), on_policy=view, alpha=1.0, temperature=2.0,
        max_steps=STEPS,
        train_dataset=rows[:1] * 24 if same else rows, data_collator=partial(in_double, LLAMA),
        examples_a_process=examples_a_process,
    )  # fmt: skip
    return {**found, "shown": view.shown}


def universal(folder: Path, alpha: float | None, *, examples_a_process: int) -> dict[str, Any]:
    """Return one update from a teacher with another tokenizer."""
    ours, theirs = (tokenizer(size) for size in (two_tokenizers.OURS, two_tokenizers.THEIRS))
    student, teacher = LLAMA.make(1).double(), LLAMA.make(2, vocab_size=len(theirs)).double()
    return trained(
        folder, student, teacher, processing_class=ours, teacher_processing_class=theirs, alpha=alpha, max_steps=1,
        objectives=UniversalLogitMatch(weight=1.5), train_dataset=datasets.Dataset.from_list(two_tokenizers.examples()),
        data_collator=DataCollatorForSeq2Seq(ours), examples_a_process=examples_a_process,
    )  # fmt: skip


def sharded(folder: Path) -> Any:
    """Return the same student, sharded over the processes by transformers at load time (FSDP2)."""
    if dist.get_rank() == 0:
        writer(1).save_pretrained(folder / "student")
    dist.barrier()
    how = DistributedConfig(fsdp_size=dist.get_world_size())
    return LLAMA.model_class.from_pretrained(folder / "student", dtype=torch.float64, distributed_config=how)


def refused(folder: Path) -> str:
    """Return the error for a teacher that is split over both processes."""
    try:
        generate_completions(sharded(folder), datasets.Dataset.from_list(LLAMA.examples(2)), folder / "refused")
    except TeacherError as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    found: dict[str, Any] = {"written": {case: completions(folder, case) for case in WRITTEN}}
    found["policies"] = {case: on_policy(folder, case, examples_a_process=2) for case in POLICIES}
    found["universal"] = {alpha: universal(folder, alpha, examples_a_process=2) for alpha in (0.0, None)}
    for how, student in (
        ("whole", writer(1)),
        ("sharded", sharded(folder)),
    ):  # one example per process: unequal lengths
        found[how] = on_policy(folder, "always, greedy", examples_a_process=1, student=student)
    found["refused"] = refused(folder)
    path = folder / f"process-{dist.get_rank()}.pt"
    torch.save({"processes": dist.get_world_size(), **found}, f"{path}.partial")
    os.replace(f"{path}.partial", path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
