"""Distil an image classifier (ViT, DeiT, DINOv2, ...) into one with fewer of its layers, on images of your own.

--dataset FOLDER of SPLIT/LABEL/x.jpg, or a Hub id with columns image and label, whose names the teacher's config has.
Every option of DistillationArguments is an option here.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import smoke
import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser
from transformers.trainer_utils import EvalPrediction, set_seed

from hf_distill import DistillationArguments, DistillationTrainer
from hf_distill.students import inherit


@dataclass
class ScriptArguments:
    teacher: str = field(default="", metadata={"help": "Fine-tuned on these labels: a folder or Hub id."})
    dataset: str = field(default="", metadata={"help": "A folder or Hub id, with columns image and label."})
    dataset_config: str | None = field(default=None, metadata={"help": "Which part of the dataset."})
    student_layers: int = field(default=4, metadata={"help": "How many of the teacher's layers the student keeps."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


@dataclass
class Collator:
    """Images to pixels, labels to the ids that the teacher's config gives their names."""

    processor: Any
    names: list[str]
    ids: dict[str, int]

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = dict(self.processor([row["image"].convert("RGB") for row in rows], return_tensors="pt"))
        return {**batch, "labels": torch.tensor([self.ids[self.names[row["label"]]] for row in rows])}


def measure(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DistillationArguments), description=__doc__)
    parser.set_defaults(output_dir="image-student", alpha=0.5, temperature=3.0, learning_rate=1e-4, num_train_epochs=5)
    parser.set_defaults(per_device_train_batch_size=64, warmup_steps=0.1, bf16=torch.cuda.is_available())
    parser.set_defaults(eval_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    parser.set_defaults(remove_unused_columns=False, dataloader_num_workers=4)  # the collator reads image and label
    if "--smoke" in sys.argv:
        parser.set_defaults(**smoke.SETTINGS, student_layers=1)
    script, args = parser.parse_args_into_dataclasses()
    if script.smoke:
        script.teacher, data = smoke.image_classifier()
    elif script.teacher and script.dataset:
        data = load_dataset(script.dataset, script.dataset_config)
    else:
        parser.error("--teacher and --dataset are needed")
    processor = AutoImageProcessor.from_pretrained(script.teacher)
    teacher = AutoModelForImageClassification.from_pretrained(script.teacher)
    names = data["train"].features["label"].names
    if unknown := set(names) - set(teacher.config.label2id):
        parser.error(f"the teacher's labels are {sorted(teacher.config.label2id)}; it has no {sorted(unknown)}")
    set_seed(args.seed)
    trainer = DistillationTrainer(
        model=inherit(teacher, layers=script.student_layers),
        teacher_model=teacher,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation" if "validation" in data else "test"],
        processing_class=processor,
        data_collator=Collator(processor, names, teacher.config.label2id),
        compute_metrics=measure,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset=script.dataset)


if __name__ == "__main__":
    main()
