"""Distil a GPT-2 large into a DistilGPT-2 on WikiText, and report the perplexity.

Both models have GPT-2's tokenizer. Every option of DistillationArguments is an option here.
"""

import math
import sys
from dataclasses import dataclass, field

import smoke
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, default_data_collator
from transformers.trainer_utils import set_seed

from hf_distill import DistillationArguments, DistillationTrainer


@dataclass
class ScriptArguments:
    dataset: str = field(default="Salesforce/wikitext", metadata={"help": "A folder or Hub id, with a column text."})
    dataset_config: str | None = field(default="wikitext-103-raw-v1", metadata={"help": "Which part of the dataset."})
    teacher: str = field(default="openai-community/gpt2-large", metadata={"help": "A folder or Hub id."})
    student: str = field(default="distilbert/distilgpt2", metadata={"help": "With the teacher's tokenizer."})
    block_size: int = field(default=512, metadata={"help": "Texts are joined and cut into blocks of so many tokens."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DistillationArguments), description=__doc__)
    parser.set_defaults(output_dir="gpt2-student", alpha=0.5, temperature=1.0, learning_rate=5e-5, num_train_epochs=1)
    parser.set_defaults(per_device_train_batch_size=8, gradient_accumulation_steps=4, warmup_steps=0.03)
    parser.set_defaults(eval_strategy="steps", eval_steps=0.25, save_strategy="steps", save_steps=0.25)
    parser.set_defaults(save_total_limit=1, bf16=torch.cuda.is_available())
    if "--smoke" in sys.argv:
        parser.set_defaults(**smoke.SETTINGS, block_size=32)
    script, args = parser.parse_args_into_dataclasses()
    if script.smoke:
        script.teacher, script.student, data = smoke.text()
    else:
        data = load_dataset(script.dataset, script.dataset_config)
    tokenizer = AutoTokenizer.from_pretrained(script.student)

    def blocks(rows: dict) -> dict:
        """Full blocks, so that nothing is padded; what is left at the end of a batch of texts is dropped."""
        lines = tokenizer(rows["text"], add_special_tokens=False)["input_ids"]  # a row is a line of a longer text
        joined = [token for ids in lines for token in ids]
        starts = range(0, len(joined) - script.block_size + 1, script.block_size)
        ids = [joined[start : start + script.block_size] for start in starts]
        return {"input_ids": ids, "labels": ids}  # the model shifts the labels

    with args.main_process_first(desc="tokenizing"):
        data = data.map(blocks, batched=True, remove_columns=data["train"].column_names)
    set_seed(args.seed)
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(script.student),
        teacher_model=script.teacher,
        teacher_processing_class=AutoTokenizer.from_pretrained(script.teacher),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
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
