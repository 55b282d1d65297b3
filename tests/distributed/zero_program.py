"""A small distillation under torchrun. Arguments: the ZeRO stage (-1 for none), and the task. Prints the loss curve.

Task: "classes", or a causal LM "with" or "without" whole logits.
"""

import json
import os
import sys
import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_distill import DistillationArguments, DistillationTrainer
from tests.heads import HEADS

LANGUAGE = HEADS["llama_causal_lm"]


def model(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    still = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "initializer_range": 0.5}
    return BertForSequenceClassification(BertConfig(intermediate_size=32, **shape, **still))


def main() -> None:
    stage, what, processes = int(sys.argv[1]), sys.argv[2], int(os.environ.get("WORLD_SIZE", "1"))
    automatic = ("train_micro_batch_size_per_gpu", "train_batch_size")
    automatic += ("gradient_accumulation_steps", "gradient_clipping")
    zero = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(automatic, "auto"),
    }
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 40, (16, 6), generator=generator).tolist()
    data = [{"input_ids": row, "labels": index % 2} for index, row in enumerate(tokens)]
    if what != "classes":
        data = LANGUAGE.examples(16)
    args = DistillationArguments(
        tempfile.mkdtemp(),
        alpha=0.7,
        max_steps=4,
        logging_steps=1,
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        evaluate_with_teacher=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        deepspeed=zero if stage >= 0 else None,
        fused_loss=what == "without",
    )
    made = model if what == "classes" else LANGUAGE.make
    trainer = DistillationTrainer(
        model=made(0),
        teacher_model=made(1),
        args=args,
        train_dataset=data,
        eval_dataset=data[:6],
        data_collator=None if what == "classes" else LANGUAGE.collate,
    )
    trainer.train()
    divergence = trainer.evaluate()["eval_divergence"]
    if trainer.is_world_process_zero():
        curve = [[row["loss"], row["loss/logits"]] for row in trainer.state.log_history if "loss" in row]
        print("CURVE", json.dumps({"losses": curve, "divergence": divergence}))


if __name__ == "__main__":
    main()
