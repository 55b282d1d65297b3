"""Distil in a hand-written Accelerate loop, without the Trainer: a BERT-base fine-tuned on SST-2 into a DistilBERT.

What the trainer does elsewhere is done here: move the teacher, count over the whole optimizer step, log the terms."""

import contextlib
import math
from dataclasses import dataclass, field
from itertools import islice

import smoke
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser
from transformers.optimization import get_linear_schedule_with_warmup

from hf_distill import Distiller, ModelTeacher


@dataclass
class ScriptArguments:
    teacher: str = field(default="textattack/bert-base-uncased-SST-2", metadata={"help": "A folder or Hub id."})
    student: str = field(default="distilbert/distilbert-base-uncased", metadata={"help": "A folder or Hub id."})
    output_dir: str = field(default="sst2-student", metadata={"help": "Where the student is saved."})
    batch_size: int = field(default=16, metadata={"help": "Examples in a micro-batch of one process."})
    accumulation: int = field(default=2, metadata={"help": "Micro-batches in an optimizer step."})
    epochs: int = field(default=3, metadata={"help": "Passes over the training set."})
    learning_rate: float = field(default=5e-5, metadata={"help": "After the warm-up."})
    temperature: float = field(default=2.0, metadata={"help": "Softens the logits of both models."})
    alpha: float = field(default=0.9, metadata={"help": "Weight of the teacher's term; the labels' is 1 - alpha."})
    log_every: int = field(default=50, metadata={"help": "Optimizer steps between two lines of losses."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


def main() -> None:
    (script,) = HfArgumentParser(ScriptArguments, description=__doc__).parse_args_into_dataclasses()
    if script.smoke:
        script.teacher, script.student, data = smoke.glue()
        script.batch_size, script.epochs, script.log_every = 1, 1, 1
    else:
        data = load_dataset("nyu-mll/glue", "sst2")
    accelerator = Accelerator(cpu=script.smoke)  # for mixed precision: accelerate launch --mixed_precision bf16
    set_seed(42)

    tokenizer = AutoTokenizer.from_pretrained(script.student)
    names = data["train"].features["label"].names
    data = data.map(lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=128), batched=True)
    data = data.select_columns(["input_ids", "attention_mask", "label"])
    options = {"batch_size": script.batch_size, "collate_fn": DataCollatorWithPadding(tokenizer)}
    train, held_out = DataLoader(data["train"], shuffle=True, **options), DataLoader(data["validation"], **options)

    student = AutoModelForSequenceClassification.from_pretrained(
        script.student, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    # The teacher learned GLUE's own numbering of the labels; its config need not name them as GLUE does.
    learned = AutoModelForSequenceClassification.from_pretrained(script.teacher)
    teacher = ModelTeacher(learned, label_matching="by_index")
    distiller = Distiller(student, teacher, temperature=script.temperature, alpha=script.alpha)
    optimizer = torch.optim.AdamW(student.parameters(), lr=script.learning_rate)
    student, optimizer, train, held_out = accelerator.prepare(student, optimizer, train, held_out)
    distiller.to(accelerator)
    steps = script.epochs * math.ceil(len(train) / script.accumulation)
    scheduler = get_linear_schedule_with_warmup(optimizer, steps // 16, steps)

    done = 0
    for _ in range(script.epochs):
        student.train()
        batches = iter(train)
        while window := list(islice(batches, script.accumulation)):
            # The denominators of the whole step, over all micro-batches and processes: nothing is divided afterwards.
            step = distiller.begin_step(window, accelerator, progress=done / steps)
            found = []
            for batch in window:
                with contextlib.nullcontext() if batch is window[-1] else accelerator.no_sync(student):
                    output = distiller(student, batch, step)
                    accelerator.backward(output.loss)
                found.append(output.terms)
            distiller.reduce_gradients(student, accelerator)
            accelerator.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            distiller.end_step(student)
            done += 1
            if done % script.log_every == 0:
                terms = {name: sum(part[name] for part in found) for name in found[0]}
                shown = {name: round(accelerator.reduce(term, "mean").item(), 6) for name, term in terms.items()}
                accelerator.print(f"step {done} of {steps}: {shown}")
        student.eval()
        with torch.no_grad():
            right = [accelerator.gather_for_metrics(student(**b).logits.argmax(-1) == b["labels"]) for b in held_out]
        accelerator.print(f"accuracy after {done} steps: {torch.cat(right).float().mean():.4f}")

    if accelerator.is_main_process:
        accelerator.unwrap_model(student).save_pretrained(script.output_dir)
        tokenizer.save_pretrained(script.output_dir)


if __name__ == "__main__":
    main()
