"""Ways to train over a vocabulary, for `end_to_end.py`: ours, TRL's GKDTrainer, a bare loop. It prints nothing.

Forward of both models, loss, backward, clipping, AdamW. All ways train one student from the same weights on the same
batches with the same loss: by default forward KL alone at T = 1, which is all that GKDTrainer has (its temperature does
not reach its loss).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from benchmarks.large_vocabulary import MIB, resident
from benchmarks.peers import Absent
from hf_distill import DistillationArguments, DistillationTrainer
from hf_distill.fused_forward import LARGE

BARE, TRL, WHOLE, OURS = "bare loop", "TRL GKDTrainer", "DistillationTrainer, whole logits", "DistillationTrainer"
MODELS = {"causal_lm": (LlamaForCausalLM, LlamaConfig), "masked_lm": (BertForMaskedLM, BertConfig)}
IGNORED, LEARNING_RATE, MASKED = -100, 1e-4, 0.15
Moment = tuple[float, float]
Found = dict[str, Any]


class Setting:
    """Models and batches. There is one student for all ways: a copy elsewhere in memory can be slower."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.steps = options, options.warm_up + options.steps
        torch.manual_seed(0)
        self.student, teacher = self._model(*options.student), self._model(*options.teacher)
        self.teacher = teacher.eval().requires_grad_(False).to(options.device)
        self.student.to(options.device)
        self._start = {name: x.clone() for name, x in self.student.state_dict().items()}
        ids = torch.randint(5, options.vocabulary, (self.steps * options.batch, options.length))
        labels = ids
        if options.kind == "masked_lm":
            hidden = torch.rand(ids.shape) < MASKED
            labels, ids = torch.where(hidden, ids, IGNORED), torch.where(hidden, 4, ids)
        mask = torch.ones_like(ids)
        self.columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _model(self, layers: int, width: int) -> Any:
        model, config = MODELS[self.options.kind]
        shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
        heads = {"num_attention_heads": max(1, width // 64), "max_position_embeddings": self.options.length}
        # No dropout, so that all have the same loss. Llama has none.
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if model is BertForMaskedLM else {}
        return model(config(vocab_size=self.options.vocabulary, **shape, **heads, **still))

    def begin(self) -> Any:
        """The student as it was."""
        for model in (self.student, self.teacher):
            for left_behind in ("forward", "_original_forward", "_is_accelerate_prepared"):  # by TRL and Accelerate
                vars(model).pop(left_behind, None)
        self.student.load_state_dict(self._start)
        self.student.zero_grad()
        return self.student.train()

    def examples(self) -> Any:
        """As a dataset for the trainers."""
        from datasets import Dataset

        return Dataset.from_dict({name: x.tolist() for name, x in self.columns.items()}).with_format("torch")


def collate(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack: all examples have one length."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


class Steps(TrainerCallback):
    """When each step begins, and the peak of the memory from the first on."""

    def __init__(self, device: str) -> None:
        self.begins: list[Moment] = []
        self.first_loss = 0.0
        self._device, self._before = device, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.begins:
            self._watch_memory()
        self.begins.append(self._now())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.begins.append(self._now())

    def seconds(self, *, warm_up: int) -> list[Moment]:
        """Of each step but the first few, on both clocks."""
        return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(self.begins)][warm_up:]

    def peak(self) -> float:
        """MiB beyond what there was when the first step began: gradients, AdamW's state, all that a step holds."""
        if self._device != "cpu":
            return torch.cuda.max_memory_allocated() / MIB - self._before
        return resident("VmHWM") - self._before

    def _watch_memory(self) -> None:
        if self._device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / MIB
            return
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is there now
        self._before = resident("VmRSS")

    def _now(self) -> Moment:
        if self._device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def naive_loss(setting: Setting, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What one would write: whole logits of both, rows that count, log_softmax, kl_div."""
    options, inputs = setting.options, {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = setting.student(**batch) if options.alpha < 1 else setting.student(**inputs)
    with torch.no_grad():
        theirs = setting.teacher(**inputs).logits
    ours, labels = outputs.logits, batch["labels"]
    if options.kind == "causal_lm":
        ours, theirs, labels = ours[:, :-1], theirs[:, :-1], labels[:, 1:]
    ours, theirs = ours[labels != IGNORED].float(), theirs[labels != IGNORED].float()
    t = options.temperature
    softened = F.log_softmax(ours / t, -1), F.log_softmax(theirs / t, -1)
    divergence = t**2 * F.kl_div(*softened, log_target=True, reduction="batchmean")
    return divergence if options.alpha == 1 else (1 - options.alpha) * outputs.loss + options.alpha * divergence


def bare(setting: Setting, steps: Steps) -> None:
    """A loop with nothing but what training needs."""
    student, device, size = setting.begin(), setting.options.device, setting.options.batch
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, fused=True)
    low = torch.autocast(device, torch.bfloat16) if setting.options.bf16 else contextlib.nullcontext()
    for first in range(0, setting.steps * size, size):
        batch = {name: x[first : first + size].to(device) for name, x in setting.columns.items()}
        steps.on_step_begin()
        with low:
            loss = naive_loss(setting, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.first_loss = steps.first_loss or loss.item()
    steps.on_train_end()


def common(setting: Setting, folder: str) -> Found:
    """Settings of either library's arguments."""
    return {
        "output_dir": folder,
        "max_steps": setting.steps,
        "per_device_train_batch_size": setting.options.batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "use_cpu": setting.options.device == "cpu",
        "bf16": setting.options.bf16,
        "dataloader_pin_memory": setting.options.device != "cpu",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_first_step": True,
        "logging_steps": 1000,
    }


def trained(trainer: Any, steps: Steps) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    steps.first_loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)


def ours(setting: Setting, steps: Steps, *, fused: bool | None) -> None:
    """DistillationTrainer; None: its own choice."""
    options = setting.options
    with tempfile.TemporaryDirectory() as folder:
        knobs = {"alpha": options.alpha, "temperature": options.temperature, "fused_loss": fused}
        args = DistillationArguments(**common(setting, folder), **knobs)
        given = {"train_dataset": setting.examples(), "data_collator": collate, "callbacks": [steps]}
        trained(DistillationTrainer(setting.begin(), args, teacher_model=setting.teacher, **given), steps)


def trl(setting: Setting, steps: Steps) -> None:
    """GKDTrainer on the dataset alone (lmbda=0), forward KL (beta=0), in full precision as the others."""
    options = setting.options
    if options.kind != "causal_lm" or (options.alpha, options.temperature) != (1.0, 1.0):
        raise Absent("causal LMs alone, and no labels' term and no temperature in the loss")
    try:
        from tokenizers import Tokenizer, models
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except (ImportError, RuntimeError) as error:
        raise Absent.because("trl", error) from error
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(**common(setting, folder), student_share=0.0, beta=0.0, gradient_checkpointing=False)
        given = {"train_dataset": setting.examples(), "data_collator": collate, "callbacks": [steps]}
        given |= {"teacher_model": setting.teacher, "processing_class": tokenizer}
        trained(GKDTrainer(setting.begin(), args=args, **given), steps)


WAYS: dict[str, Callable[[Setting, Steps], None]] = {
    BARE: bare,
    TRL: trl,
    WHOLE: lambda setting, steps: ours(setting, steps, fused=False),
    # None, its default, where the vocabulary is large enough for that to be without logits.
    OURS: lambda setting, steps: ours(setting, steps, fused=None if setting.options.vocabulary >= LARGE else True),
}
