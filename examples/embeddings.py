"""Distil a sentence encoder into one with fewer of its layers: texts without labels, embeddings like the teacher's.

Reports eval_divergence on held-out texts: the mean squared difference of student's and teacher's embeddings.
Texts of your own: --train_file FILE --text_column text.
Every option of DistillationArguments is an option here.
"""

import sys
from dataclasses import dataclass, field

import smoke
import torch
from datasets import load_dataset
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser
from transformers.trainer_utils import set_seed

from hf_distill import DistillationArguments, DistillationTrainer
from hf_distill.students import inherit
from hf_distill.tasks.regression import Embedding


@dataclass
class ScriptArguments:
    teacher: str = field(default="sentence-transformers/all-MiniLM-L12-v2", metadata={"help": "A folder or Hub id."})
    pooling: str = field(default="mean", metadata={"help": "How the teacher pools: mean, first (CLS) or last."})
    student_layers: int = field(default=4, metadata={"help": "How many of the teacher's layers the student keeps."})
    train_file: str | None = field(default=None, metadata={"help": "A csv, jsonl or parquet file; else AG News."})
    text_column: str = field(default="text", metadata={"help": "The column of the texts."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to so many tokens."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DistillationArguments), description=__doc__)
    # Without labels: alpha=1. The teacher's values are compared by their mean squared error.
    parser.set_defaults(output_dir="embedding-student", alpha=1.0, evaluate_with_teacher=True, learning_rate=1e-4)
    parser.set_defaults(per_device_train_batch_size=64, num_train_epochs=1, warmup_steps=0.1)
    parser.set_defaults(bf16=torch.cuda.is_available())
    if "--smoke" in sys.argv:
        parser.set_defaults(**smoke.SETTINGS, student_layers=1, text_column="sentence")
    script, args = parser.parse_args_into_dataclasses()
    if script.smoke:
        script.teacher, _, data = smoke.glue()
        data = data["train"].remove_columns("label")
    elif script.train_file:
        kind = {"csv": "csv", "parquet": "parquet"}.get(script.train_file.rpartition(".")[2], "json")
        data = load_dataset(kind, data_files=script.train_file, split="train")
    else:
        data = load_dataset("fancyzhx/ag_news", split="train")
    tokenizer = AutoTokenizer.from_pretrained(script.teacher)
    teacher = AutoModel.from_pretrained(script.teacher)
    cut = {"truncation": True, "max_length": script.max_length}
    data = data.map(
        lambda rows: tokenizer(rows[script.text_column], **cut), batched=True, remove_columns=data.column_names
    ).train_test_split(test_size=min(1000, max(1, len(data) // 10)), seed=42)
    set_seed(args.seed)
    trainer = DistillationTrainer(
        model=inherit(teacher, layers=script.student_layers),
        teacher_model=teacher,
        task=Embedding(script.pooling),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("eval", trainer.evaluate())
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
