"""A program, not a test: one step of every head, and evaluations, in each of several processes; process 0 writes.

`torchrun --nproc-per-node 2 two_processes.py FILE` (started by `test_two_processes`).
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.utils import logging

from tests.heads import HEADS
from tests.trainer.steps import VARIED, alphas_of, asked_teacher, one_step

CUTS = ((4, 1), (2, 2))  # examples a micro-batch, micro-batches a process; twice that is the eight


EVALUATED = [("bert_single_label", 7), ("bert_tokens", 7), ("bert_span", 8), ("t5_seq2seq", 5)]  # head, examples
WHOLE_BATCHES = (  # six examples of each: a batch of three a process
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
    """Head, alpha, the cut, and what the labels' loss is. Each term alone only for one head of each kind of count."""
    alone = ("bert_single_label", "llama_causal_lm", "hubert_ctc_sum")
    made = []
    for name in HEADS:
        for alpha in alphas_of(name):
            if alpha == 0.5 or name in alone or alphas_of(name) == (1.0,):
                made += [(name, alpha, *cut, "plain") for cut in (CUTS if alpha == 0.5 else CUTS[1:])]
    return made + [(name, 0.5, *CUTS[1], variant) for name, variant in VARIED]


def main(path: str) -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # Accelerate collects at the start of every training: a second each, with all of transformers loaded
    logging.set_verbosity_error()
    found, evaluated = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            name, alpha, micro_batch, accumulation, variant = case
            cut = {"micro_batch": micro_batch, "accumulation": accumulation}
            state, logged = one_step(folder, HEADS[name], alpha=alpha, variant=variant, **cut)
            found[case] = (state, logged)
        for name, count in [*EVALUATED, *((name, 6) for name in WHOLE_BATCHES)]:
            evaluated[name, count] = asked_teacher(folder, HEADS[name], count=count)
    rank, processes = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        torch.save({"processes": processes, "found": found, "evaluated": evaluated}, f"{path}.partial")
        os.replace(f"{path}.partial", path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(str(Path(sys.argv[1])))
