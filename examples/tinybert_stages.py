"""Distil a fine-tuned BERT into a thin BERT as TinyBERT does: first its inside, without labels, then its predictions.

Every option of DistillationArguments is an option here; the stages' own (epochs, learning rates, alpha) come first.
"""

import sys
from dataclasses import dataclass, field

import smoke
import torch
from datasets import load_dataset
from sklearn.metrics import accuracy_score
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from transformers.trainer_utils import set_seed

from hf_distill import DistillationArguments
from hf_distill.presets import tinybert
from hf_distill.runs import train_in_stages


@dataclass
class ScriptArguments:
    teacher: str = field(default="textattack/bert-base-uncased-SST-2", metadata={"help": "A folder or Hub id."})
    student: str = field(
        default="huawei-noah/TinyBERT_General_4L_312D", metadata={"help": "Thinner, of the same vocabulary."}
    )
    intermediate_epochs: float = field(default=10, metadata={"help": "Of the first stage; the paper has 20."})
    prediction_epochs: float = field(default=3, metadata={"help": "Of the second stage."})
    resume: bool = field(default=False, metadata={"help": "Go on with what lies in the output folder."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DistillationArguments), description=__doc__)
    parser.set_defaults(output_dir="tinybert-student", per_device_train_batch_size=32, bf16=torch.cuda.is_available())
    parser.set_defaults(eval_strategy="epoch", save_strategy="epoch", save_total_limit=1, label_matching="by_index")
    if "--smoke" in sys.argv:
        parser.set_defaults(**smoke.SETTINGS)
    script, args = parser.parse_args_into_dataclasses()
    if script.smoke:
        script.teacher, script.student, data = smoke.glue()
    else:
        data = load_dataset("nyu-mll/glue", "sst2")
    tokenizer = AutoTokenizer.from_pretrained(script.teacher)
    tokens = data.map(lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=128), batched=True)
    names = data["train"].features["label"].names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config = AutoConfig.from_pretrained(script.student, **labels)
    set_seed(args.seed)
    preset = tinybert(
        intermediate={"num_train_epochs": script.intermediate_epochs},
        prediction={"num_train_epochs": script.prediction_epochs},
    )
    print(preset)
    # Augmented copies of the training set (hf_distill.augment.augment_dataset) are a large part of TinyBERT's success.
    result = train_in_stages(
        preset,
        model=AutoModelForSequenceClassification.from_pretrained(script.student, config=config),
        teacher_model=script.teacher,
        args=args,
        resume_from_checkpoint=script.resume,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        processing_class=tokenizer,
        compute_metrics=lambda found: {
            "accuracy": float(accuracy_score(found.label_ids, found.predictions.argmax(-1)))
        },
    )
    trainer = result.trainer
    trainer.log_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
