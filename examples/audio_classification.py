"""Distil an audio classifier (Wav2Vec2, HuBERT, AST, ...) into one with fewer of its layers, on recordings of your own.

--dataset FOLDER of SPLIT/LABEL/x.wav, or of SPLIT/metadata.csv (file_name,label) and audio files, or a Hub id.
Every option of DistillationArguments is an option here.
"""

import sys
from dataclasses import dataclass, field

import own_data
import smoke
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, HfArgumentParser
from transformers.trainer_utils import EvalPrediction, set_seed

from hf_distill import DistillationArguments, DistillationTrainer
from hf_distill.data.audio import AudioFeatures
from hf_distill.students import inherit


@dataclass
class ScriptArguments:
    teacher: str = field(default="", metadata={"help": "Fine-tuned on these labels: a folder or Hub id."})
    dataset: str = field(default="", metadata={"help": "A folder or Hub id, with columns audio and label."})
    dataset_config: str | None = field(default=None, metadata={"help": "Which part of the dataset."})
    train_split: str | None = field(default=None, metadata={"help": "Its validation or test split is measured on."})
    student_layers: int = field(default=4, metadata={"help": "How many of the teacher's layers the student keeps."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


@dataclass
class Collator:
    """Recordings to what the models read, labels to the ids that the teacher's config gives their names."""

    features: AudioFeatures
    names: list[str] | None
    ids: dict[str, int]

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.features([row["audio"] for row in rows])
        labels = [row["label"] if self.names is None else self.names[row["label"]] for row in rows]
        return {**batch, "labels": torch.tensor([self.ids[str(label)] for label in labels])}


def measure(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DistillationArguments), description=__doc__)
    parser.set_defaults(output_dir="audio-student", alpha=0.5, temperature=2.0, learning_rate=3e-5, num_train_epochs=5)
    parser.set_defaults(per_device_train_batch_size=16, warmup_steps=0.1, bf16=torch.cuda.is_available())
    parser.set_defaults(eval_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    parser.set_defaults(remove_unused_columns=False, dataloader_num_workers=4)  # the collator reads audio and label
    if "--smoke" in sys.argv:
        parser.set_defaults(**smoke.SETTINGS, student_layers=1)
    script, args = parser.parse_args_into_dataclasses()
    if script.smoke:
        script.teacher, data = smoke.audio_classifier()
        train, held_out = data.values()
    elif script.teacher and script.dataset:
        train, held_out = own_data.recordings(script.dataset, script.dataset_config, script.train_split, "label")
    else:
        parser.error("--teacher and --dataset are needed")
    extractor = AutoFeatureExtractor.from_pretrained(script.teacher)
    teacher = AutoModelForAudioClassification.from_pretrained(script.teacher)
    names = getattr(train.features["label"], "names", None)  # of numbered labels; words have none
    unknown = {str(name) for name in names or train.unique("label")} - set(teacher.config.label2id)
    if unknown:
        parser.error(f"the teacher's labels are {sorted(teacher.config.label2id)}; it has no {sorted(unknown)}")
    set_seed(args.seed)
    trainer = DistillationTrainer(
        model=inherit(teacher, layers=script.student_layers),
        teacher_model=teacher,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=extractor,
        data_collator=Collator(AudioFeatures(extractor), names, teacher.config.label2id),
        compute_metrics=measure,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset=script.dataset)


if __name__ == "__main__":
    main()
