"""Distil in a hand-written Accelerate loop, without the Trainer: a BERT-base fine-tuned on SST-2 into a DistilBERT."""

import contextlib
from itertools import islice

import smoke
import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_distill import Distiller, ModelTeacher


def main() -> None:
    args = smoke.options(
        __doc__,
        **{"teacher": "textattack/bert-base-uncased-SST-2", "student": "distilbert/distilbert-base-uncased"},
        **{"output_dir": "sst2-student", "accumulation": 2, "learning_rate": 5e-5, "temperature": 2.0, "alpha": 0.9},
    )
    *models, data = smoke.glue() if args.smoke else (args.teacher, args.student, load_dataset("nyu-mll/glue", "sst2"))
    accelerator = Accelerator(cpu=args.smoke)  # for mixed precision: accelerate launch --mixed_precision bf16
    torch.manual_seed(42)
    teacher, student = map(AutoModelForSequenceClassification.from_pretrained, models)
    tokenizer = AutoTokenizer.from_pretrained(models[1])
    rows = data["train"].map(lambda row: tokenizer(row["sentence"], truncation=True))
    rows = rows.select_columns(["input_ids", "attention_mask", "label"])
    train = DataLoader(rows, 1 if args.smoke else 16, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    teacher = ModelTeacher(teacher, label_matching="by_index")  # its config need not name the labels as GLUE does
    distiller = Distiller(student, teacher, temperature=args.temperature, alpha=args.alpha)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate)
    student, optimizer, train = accelerator.prepare(student.train(), optimizer, train)
    distiller.to(accelerator)
    batches, steps = iter(train), -(-len(train) // args.accumulation)
    for number in range(steps):
        window = list(islice(batches, args.accumulation))
        step = distiller.begin_step(
            window, accelerator, progress=number / steps
        )  # counts rows: nothing is divided later
        found = []
        for batch in window:
            with contextlib.nullcontext() if batch is window[-1] else accelerator.no_sync(student):
                found.append(distiller(student, batch, step))
                accelerator.backward(found[-1].loss)
        distiller.reduce_gradients(student, accelerator)
        accelerator.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        distiller.end_step(student)
        sums = {name: sum(out.terms[name] for out in found) for name in found[0].terms}
        shown = {name: round(accelerator.reduce(term, "mean").item(), 6) for name, term in sums.items()}
        accelerator.print(f"step {number + 1} of {steps}: {shown}")
    if accelerator.is_main_process:
        accelerator.unwrap_model(student).save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
