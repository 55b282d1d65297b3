"""A program: training with and without whole logits, under each wrapper, in two processes.

`without_logits_program.py CASE ...` in two processes; the first prints both trainings of each case.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hf_distill import DistillationTrainer, Distiller
from tests.heads import HEADS, IGNORED, Example, Head
from tests.trainer.steps import in_double
from tests.trainer.tiny import PLAIN_STEP, arguments, update_difference

STEPS = 3
Trained = tuple[dict[str, Tensor], dict[str, Tensor], list[float], list[str]]
# Head, alpha, training arguments, and whether student and teacher are whole or sharded at load time (FSDP2).
CASES: dict[str, tuple[str, float, dict[str, Any], tuple[bool, bool]]] = {
    "ddp": ("llama_causal_lm", 0.5, {}, (False, False)),
    "ddp, every parameter used": ("bert_masked_lm", 1.0, {"ddp_find_unused_parameters": False}, (False, False)),
    "ddp, static graph": ("t5_seq2seq", 0.5, {"ddp_static_graph": True, "cut": (4, 1)}, (False, False)),
    "ddp, one process without a row": ("llama_causal_lm", 1.0, {"silent": True}, (False, False)),
    "fsdp2, head apart": ("llama_causal_lm", 0.5, {}, (True, False)),
    "fsdp2, head tied": ("bert_masked_lm", 1.0, {}, (True, False)),
    "fsdp1": ("llama_causal_lm", 0.5, {}, (True, False)),
    # The others are slow.
    "fsdp2, teacher too": ("llama_causal_lm", 0.5, {}, (True, True)),
    "ddp, twenty steps": ("gpt2_causal_lm", 0.5, {"max_steps": 20, "learning_rate": 0.5}, (False, False)),
    "ddp, labels": ("bert_masked_lm", 0.5, {}, (False, False)),
    "ddp, seq2seq": ("bart_seq2seq", 1.0, {"ddp_find_unused_parameters": False}, (False, False)),
    "ddp, checkpointing": ("llama_causal_lm", 0.5, {"activation_checkpointing": True}, (False, False)),
    "fsdp2, checkpointing": ("llama_causal_lm", 0.5, {"activation_checkpointing": True}, (True, False)),
}
QUICK = tuple(CASES)[:7]


def examples_of(head: Head, count: int, *, silent: bool) -> list[Example]:
    """`silent`: the second process's examples have no valid label."""
    made = head.examples(count)
    for index, example in enumerate(made):
        if silent and index // 2 % 2 == 1:
            example["labels"] = [IGNORED] * len(example["labels"])
    return made


def made(head: Head, seed: int, folder: str, *, sharded: bool) -> Any:
    """Return the model of this seed in fp64, sharded at load time if requested."""
    path = os.path.join(folder, str(seed))
    if dist.get_rank() == 0:
        head.make(seed, layers=2).double().save_pretrained(path)
    dist.barrier()
    how = {"distributed_config": DistributedConfig(fsdp_size=2)} if sharded else {}
    return head.model_class.from_pretrained(path, dtype=torch.float64, **how)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(x, "full_tensor", lambda x=x: x)().detach().clone() for name, x in model.state_dict().items()}


def wrapped_as(model: nn.Module) -> str:
    """Return the wrapper of the model; if sharded, whether every parameter is."""
    if all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters()):
        return "every parameter sharded"
    return type(model).__name__


def with_trainer(case: str, folder: str, *, fused: bool) -> Trained:
    """Return the weights after and before, the losses, and the wrappers of student and teacher."""
    name, alpha, settings, (student_sharded, teacher_sharded) = CASES[case]
    micro_batch, accumulation = settings.get("cut", (2, 2))
    own = {key: value for key, value in settings.items() if key not in ("cut", "silent")}
    head = HEADS[name]
    student = made(head, 0, folder, sharded=student_sharded)
    teacher = made(head, 1, folder, sharded=teacher_sharded)
    before, steps = whole(student), own.get("max_steps", STEPS)
    plain = {**PLAIN_STEP, "learning_rate": 0.1, "max_steps": STEPS, "logging_steps": 1, "temperature": 3.0}
    args = arguments(
        folder,
        **{**plain, **own},
        alpha=alpha,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        fused_loss=fused,
    )
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=examples_of(head, 8 * steps, silent="silent" in settings),
        data_collator=partial(in_double, head),
    )
    teacher_wrapped = wrapped_as(teacher)  # after a forward without a backward, its outermost parameters are gathered
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return whole(student), before, losses, [wrapped_as(trainer.model_wrapped), teacher_wrapped]


def with_fsdp1(case: str, folder: str, *, fused: bool) -> Trained:
    """Do the same without the trainer: on a CPU Accelerate uses DDP."""
    head, accelerator = HEADS[CASES[case][0]], Accelerator(cpu=True)
    student, teacher = (head.make(seed, layers=2).double() for seed in (0, 1))
    distiller = Distiller(student, teacher, fused_loss=fused)
    blocks = ModuleWrapPolicy({type(student.get_decoder().layers[0])})
    before = {name: x.detach().clone() for name, x in student.state_dict().items()}
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(student, device_id=cpu, use_orig_params=True, auto_wrap_policy=blocks)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(STEPS):
        first = 4 * step + 2 * dist.get_rank()
        batch = in_double(head, head.examples(4 * STEPS)[first : first + 2])
        output = distiller(model, batch, distiller.begin_step([batch], accelerator))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(output.loss.detach(), "mean")))
    with FullyShardedDataParallel.summon_full_params(model):
        after = {name: x.detach().clone() for name, x in model.module.state_dict().items()}
    return after, before, losses, [wrapped_as(model), wrapped_as(teacher)]


def compared(case: str) -> dict[str, Any]:
    """Return the distance of the two updates, and both curves."""
    train = with_fsdp1 if case == "fsdp1" else with_trainer
    folders: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    (plain, before, curve, _), (fused, _, without, wrapped) = (
        train(case, os.path.join(folders[0], str(how)), fused=how) for how in (False, True)
    )
    apart = update_difference(fused, plain, before)
    return {"apart": apart, "with": curve, "without": without, "wrapped": wrapped}


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    found = {case: compared(case) for case in sys.argv[1:] or CASES}
    if dist.get_rank() == 0:
        print("FOUND", json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
