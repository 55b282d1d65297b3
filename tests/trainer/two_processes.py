"""A program: steps of every head, evaluations, and a sharded teacher, in several processes.

`torchrun --nproc-per-node 2 two_processes.py FILE` (started by `test_two_processes`); process 0 writes the file.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.utils import logging

from tests.distributed.sharded import sharded_teacher
from tests.heads import HEADS
from tests.trainer.drop_in_steps import everything
from tests.trainer.each_once import EVALUATIONS, evaluated
from tests.trainer.not_finite import FAULTS, what_each_process_raises
from tests.trainer.steps import VARIED, alphas_of, asked_teacher, inside_steps, one_step

CUTS = ((4, 1), (2, 2))  # examples per micro-batch, micro-batches per process; doubled, they make eight


EVALUATED = [("bert_single_label", 7), ("bert_tokens", 7), ("bert_span", 8), ("t5_seq2seq", 5)]  # head, examples
WHOLE_BATCHES = (  # six examples each: a batch of three per process
    "bert_single_label",
    "bert_multi_label",
    "vit_image_class",
    "bert_regression",
    "wav2vec2_ctc_mean",
    "bert_tokens",
    "llama_causal_lm",
    "t5_seq2seq",
)


def cases() -> list[tuple[str, float, int, int, str]]:
    """Return head, alpha, split, and labels' loss.

    Each term alone runs only for one head of each kind of count; without accumulation only one head of each task.
    """
    alone = ("bert_single_label", "llama_causal_lm", "hubert_ctc_sum")
    one_of_a_kind = {head.kind: name for name, head in HEADS.items()}.values()
    made = []
    for name in HEADS:
        for alpha in alphas_of(name):
            if alpha == 0.5 or name in alone or alphas_of(name) == (1.0,):
                cuts = CUTS if alpha == 0.5 and name in one_of_a_kind else CUTS[1:]
                made += [(name, alpha, *cut, "plain") for cut in cuts]
    return made + [(name, 0.5, *CUTS[1], variant) for name, variant in VARIED]


def inside_cases() -> list[tuple[str, str, float | None, str]]:
    """Return head, objectives, alpha, optimizer."""
    several = ("bert_tokens", "llama_causal_lm", "t5_seq2seq", "wav2vec2_ctc_mean", "vit_image_class")
    made: list[tuple[str, str, float | None, str]] = [(name, "projected", 0.5, "adamw_torch") for name in several]
    made += [(name, "projected", None, "adamw_torch") for name in ("bert_tokens", "t5_seq2seq", "bert_embedding")]
    made += [("bert_tokens", "projected", alpha, "sgd") for alpha in (None, 0.0, 1.0)]
    made += [("bert_tokens", kind, 0.5, "adamw_torch") for kind in ("attention", "scheduled", "similarity")]
    made += [("t5_seq2seq", "attention", None, "adamw_torch"), ("bert_embedding", "projected", 1.0, "adamw_torch")]
    return [*made, *(("bert_tokens", kind, None, "adamw_torch") for kind in ("lower_block", "similarity"))]


def main(path: str) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    found, asked, inside, each_once, raised = {}, {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            name, alpha, micro_batch, accumulation, variant = case
            cut = {"micro_batch": micro_batch, "accumulation": accumulation}
            state, logged = one_step(folder, HEADS[name], alpha=alpha, variant=variant, **cut)
            found[case] = (state, logged)
        for name, count in [*EVALUATED, *((name, 6) for name in WHOLE_BATCHES)]:
            asked[name, count] = asked_teacher(folder, HEADS[name], count=count)
        for evaluation in EVALUATIONS:
            each_once[evaluation] = evaluated(folder, *evaluation)
        for name, kind, alpha, optim in inside_cases():
            cut = {"micro_batch": 2, "accumulation": 2}
            own = inside_steps(folder, HEADS[name], kind=kind, alpha=alpha, optim=optim, **cut)
            inside[name, kind, alpha, optim] = own
        dropped_in = everything(folder, 4)
        for fault in FAULTS:
            raised[fault] = what_each_process_raises(folder, fault)
    sharded = sharded_teacher()
    rank, processes = dist.get_rank(), dist.get_world_size()
    learned: list[object] = [None] * processes
    dist.all_gather_object(learned, {case: own["learned"] for case, own in inside.items()})
    if rank == 0:
        all_found = {"found": found, "evaluated": asked, "inside": inside, "learned": learned, "sharded": sharded}
        more = {"each_once": each_once, "raised": raised, "drop_in": dropped_in}
        torch.save({"processes": processes, **all_found, **more}, f"{path}.partial")
        os.replace(f"{path}.partial", path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(str(Path(sys.argv[1])))
