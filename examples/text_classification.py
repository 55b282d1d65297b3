"""Distil a BERT-large fine-tuned on a GLUE task into a DistilBERT; --baseline trains that student alone, too.

Data of your own: --train_file my.csv --text_column text --label_column label --teacher FOLDER; labels may be words.
Every option of DistillationArguments (and so of TrainingArguments) is an option here: --alpha 0.5 --bf16 false ...
"""

import copy
import sys
from dataclasses import dataclass, field

import own_data
import smoke
import torch
from datasets import load_dataset
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser
from transformers.trainer_utils import EvalPrediction, set_seed

from hf_distill import DistillationArguments, DistillationTrainer


@dataclass
class ScriptArguments:
    task: str = field(default="sst2", metadata={"help": "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli."})
    train_file: str | None = field(default=None, metadata={"help": "A csv or jsonl file, instead of a GLUE task."})
    validation_file: str | None = field(default=None, metadata={"help": "Without it a tenth of --train_file."})
    text_column: str = field(default="text", metadata={"help": "Of --train_file."})
    label_column: str = field(default="label", metadata={"help": "Of --train_file; may be empty in some rows."})
    teacher: str = field(
        default="yoshitomo-matsubara/bert-large-uncased-{task}", metadata={"help": "Fine-tuned: a folder or Hub id."}
    )
    student: str = field(default="distilbert/distilbert-base-uncased", metadata={"help": "A folder or Hub id."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to so many tokens."})
    baseline: bool = field(default=False, metadata={"help": "Also train with alpha=0, at equal steps, and print both."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


def measure(task: str, prediction: EvalPrediction) -> dict[str, float]:
    """One of the scores that GLUE reports for the task."""
    labels, outputs = prediction.label_ids, prediction.predictions
    if task == "stsb":
        return {"pearson": float(pearsonr(labels, outputs.squeeze(-1)).statistic)}
    score = {"cola": matthews_corrcoef, "mrpc": f1_score, "qqp": f1_score}.get(task, accuracy_score)
    return {score.__name__.removesuffix("_score"): float(score(labels, outputs.argmax(-1)))}


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DistillationArguments), description=__doc__)
    parser.set_defaults(output_dir="glue-student", alpha=0.9, temperature=2.0, learning_rate=5e-5, num_train_epochs=3)
    parser.set_defaults(per_device_train_batch_size=32, warmup_steps=0.06, bf16=torch.cuda.is_available())
    parser.set_defaults(eval_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    # The default teachers learned GLUE's own numbering of the labels; their configs need not name them as GLUE does.
    if not any(word.startswith("--train_file") for word in sys.argv):
        parser.set_defaults(label_matching="by_index")
    if "--smoke" in sys.argv:
        parser.set_defaults(**smoke.SETTINGS)
    script, args = parser.parse_args_into_dataclasses()
    script.teacher = script.teacher.format(task=script.task)
    if script.smoke:
        script.teacher, script.student, data = smoke.glue()
    elif script.train_file:
        columns = script.text_column, script.label_column
        script.task, data = "own", own_data.texts(script.train_file, script.validation_file, *columns)
    else:
        data = load_dataset("nyu-mll/glue", script.task)

    # Both share BERT's vocabulary. Only the teacher's tokenizer makes token_type_ids, which tell a BERT two sentences
    # apart and which a DistilBERT does not read: the trainer hands each model what it reads.
    tokenizer, teacher_tokenizer = (AutoTokenizer.from_pretrained(path) for path in (script.student, script.teacher))
    features = data["train"].features
    texts = [name for name, feature in features.items() if feature.dtype == "string"]
    names = getattr(features["label"], "names", ["score"])  # STS-B has none: a regression
    cut = {"truncation": True, "max_length": script.max_length}
    data = data.map(lambda rows: teacher_tokenizer(*(rows[name] for name in texts), **cut), batched=True)

    def train(settings: DistillationArguments) -> dict[str, float]:
        set_seed(settings.seed)  # before the student gets its new head: the same one both times
        trainer = DistillationTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(
                script.student, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
            ),
            teacher_model=script.teacher,
            teacher_processing_class=teacher_tokenizer,
            args=settings,
            train_dataset=data["train"],
            eval_dataset=data["validation_matched" if script.task == "mnli" else "validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(teacher_tokenizer),
            compute_metrics=lambda prediction: measure(script.task, prediction),
        )
        trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
        metrics = trainer.evaluate()
        trainer.save_model()
        if settings.push_to_hub:
            trainer.push_to_hub(dataset="nyu-mll/glue")
        return metrics

    results = {"distilled": train(args)}
    if script.baseline:
        alone = copy.copy(args)
        alone.alpha, alone.alpha_schedule, alone.evaluate_with_teacher = 0.0, "constant", False
        alone.output_dir, alone.push_to_hub, alone.resume_from_checkpoint = f"{args.output_dir}-alone", False, None
        results["alone"] = train(alone)
    for name, metrics in results.items():
        print(f"{name}: {metrics}")


if __name__ == "__main__":
    main()
