"""Set-ups that a distilling trainer refuses, each with the way out."""

from __future__ import annotations

from typing import Any

from hf_distill.distiller import Distiller
from hf_distill.errors import SettingError


def refuse_data_parallel(args: Any, model: Any) -> None:
    """One process with several GPUs, unless one model lies over all of them."""
    if args is None or args.n_gpu <= 1 or getattr(model, "hf_device_map", None):
        return
    raise SettingError(
        f"{args.n_gpu} GPUs in one process: that is DataParallel, which splits a batch behind the loss's back, and is "
        f"refused. Start one process a GPU: accelerate launch --num_processes {args.n_gpu} your_script.py. For one "
        "GPU, set CUDA_VISIBLE_DEVICES=0."
    )


def refuse_sequence_parallel(trainer: Any) -> None:
    if trainer.get_cp_size() > 1 or trainer.get_sp_size() > 1:
        raise SettingError(
            "context or sequence parallelism: the rows of a sequence are then on different processes, which is not "
            "supported. Use data parallelism, FSDP or tensor parallelism."
        )


def refuse_unlabelled(distiller: Distiller, *, train_dataset: Any, data_collator: Any) -> None:
    """Labels that are needed and cannot come. A collator of the user's may make them: then the first step tells."""
    columns = getattr(train_dataset, "column_names", None)
    if columns is None or data_collator is not None or not distiller.needs_labels():
        return
    if not {"label", "label_ids"} & set(columns):  # transformers' own collators rename these
        distiller.require_labels({name: name for name in columns})
