"""Distil Qwen2.5 1.5B into 0.5B on answers that the student writes itself, to the questions of GSM8K.

Generalized knowledge distillation: a share of the batches is continued by the student, and the teacher says what it
would have written. Every option of DistillationArguments is an option here.
"""

import math
import sys
from dataclasses import dataclass, field

import smoke
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, HfArgumentParser
from transformers.trainer_utils import set_seed

from hf_distill import DistillationArguments, DistillationTrainer
from hf_distill.augment import OnPolicy


@dataclass
class ScriptArguments:
    dataset: str = field(default="openai/gsm8k", metadata={"help": "With columns question and answer."})
    dataset_config: str | None = field(default="main", metadata={"help": "Which part of the dataset."})
    teacher: str = field(default="Qwen/Qwen2.5-1.5B-Instruct", metadata={"help": "A folder or Hub id."})
    student: str = field(default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "With the teacher's tokenizer."})
    student_share: float = field(default=0.5, metadata={"help": "Share of the batches that the student continues."})
    max_new_tokens: int = field(default=256, metadata={"help": "The longest text that it writes."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DistillationArguments), description=__doc__)
    parser.set_defaults(output_dir="qwen-student", alpha=1.0, temperature=1.0, divergence="jensen_shannon")
    parser.set_defaults(learning_rate=1e-5, num_train_epochs=1, per_device_train_batch_size=8, warmup_steps=0.03)
    parser.set_defaults(eval_strategy="steps", eval_steps=0.25, save_strategy="steps", save_steps=0.25)
    parser.set_defaults(save_total_limit=1, bf16=torch.cuda.is_available())
    if "--smoke" in sys.argv:
        parser.set_defaults(**smoke.SETTINGS, student_share=1.0, max_new_tokens=8)
    script, args = parser.parse_args_into_dataclasses()
    if script.smoke:
        script.teacher, script.student, data = smoke.text()
        data = data.map(lambda row: {"question": row["text"][:6], "answer": row["text"][6:]})
        data["test"] = data.pop("validation")
    else:
        data = load_dataset(script.dataset, script.dataset_config)
    tokenizer = AutoTokenizer.from_pretrained(script.student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def tokenized(row: dict) -> dict:
        """The gold answer is what batches that are not continued hold, and what is evaluated on."""
        asked = tokenizer(f"{row['question']}\n")["input_ids"]
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]  # what begins a text is there already
        told = [*answer, tokenizer.eos_token_id]
        return {"input_ids": asked + told, "labels": [-100] * len(asked) + told}

    with args.main_process_first(desc="tokenizing"):
        data = data.map(tokenized, remove_columns=data["train"].column_names)
    set_seed(args.seed)
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(script.student),
        teacher_model=script.teacher,
        teacher_processing_class=AutoTokenizer.from_pretrained(script.teacher),
        on_policy=OnPolicy(student_share=script.student_share, max_new_tokens=script.max_new_tokens, seed=args.seed),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    metrics["eval_perplexity"] = math.exp(metrics["eval_loss"])
    trainer.save_model()
    trainer.log_metrics("eval", metrics)
    if args.push_to_hub:
        trainer.push_to_hub(dataset=script.dataset)


if __name__ == "__main__":
    main()
