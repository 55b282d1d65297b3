"""Distil a BERT-large fine-tuned for named entities into a DistilBERT, on CoNLL-2003.

The teacher's labels are those of the data in another order: they are paired by name.
Every option of DistillationArguments is an option here.
"""

import sys
from dataclasses import dataclass, field

import numpy as np
import smoke
import torch
from datasets import load_dataset
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    HfArgumentParser,
)
from transformers.trainer_utils import EvalPrediction, set_seed

from hf_distill import DistillationArguments, DistillationTrainer

IGNORED = -100


@dataclass
class ScriptArguments:
    dataset: str = field(default="lhoestq/conll2003", metadata={"help": "With columns tokens and ner_tags."})
    teacher: str = field(default="dslim/bert-large-NER", metadata={"help": "Folder or Hub id."})
    student: str = field(default="distilbert/distilbert-base-cased", metadata={"help": "Folder or Hub id."})
    max_length: int = field(default=256, metadata={"help": "Longer sentences are cut to so many tokens."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DistillationArguments), description=__doc__)
    parser.set_defaults(output_dir="ner-student", alpha=0.9, temperature=2.0, learning_rate=5e-5, num_train_epochs=3)
    parser.set_defaults(per_device_train_batch_size=32, warmup_steps=0.06, bf16=torch.cuda.is_available())
    parser.set_defaults(eval_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    if "--smoke" in sys.argv:
        parser.set_defaults(**smoke.SETTINGS)
    script, args = parser.parse_args_into_dataclasses()
    if script.smoke:
        script.teacher, script.student, data = smoke.ner()
    else:
        data = load_dataset(script.dataset)
    names = data["train"].features["ner_tags"].feature.names
    tokenizer = AutoTokenizer.from_pretrained(script.student)

    def encode(rows: dict) -> dict:
        """The first piece of each word bears its tag. Other pieces bear none, and are not distilled either."""
        encoded = tokenizer(rows["tokens"], is_split_into_words=True, truncation=True, max_length=script.max_length)
        encoded["labels"] = []
        for row, tags in enumerate(rows["ner_tags"]):
            words = encoded.word_ids(row)
            firsts = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
            encoded["labels"].append([tags[w] if first else IGNORED for w, first in zip(words, firsts, strict=True)])
        return encoded

    def tags_of(prediction: EvalPrediction) -> tuple[list[list[str]], list[list[str]]]:
        kept = prediction.label_ids != IGNORED
        columns = prediction.label_ids, np.argmax(prediction.predictions, axis=-1)
        return tuple([[names[i] for i in row[keep]] for row, keep in zip(x, kept, strict=True)] for x in columns)

    def measure(prediction: EvalPrediction) -> dict[str, float]:
        """Of whole entities, as the CoNLL script counts them."""
        scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
        return {name: float(score(*tags_of(prediction), zero_division=0)) for name, score in scores.items()}

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
    set_seed(args.seed)
    trainer = DistillationTrainer(
        model=AutoModelForTokenClassification.from_pretrained(
            script.student, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
        ),
        teacher_model=script.teacher,
        teacher_processing_class=AutoTokenizer.from_pretrained(script.teacher),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=measure,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    prediction = trainer.predict(data["validation"], metric_key_prefix="eval")
    trainer.save_model()
    trainer.log_metrics("eval", prediction.metrics)
    if args.process_index == 0:
        print(classification_report(*tags_of(prediction), zero_division=0))
    if args.push_to_hub:
        trainer.push_to_hub(dataset=script.dataset)


if __name__ == "__main__":
    main()
