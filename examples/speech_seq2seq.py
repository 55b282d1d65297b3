"""Distil a Whisper medium into a Whisper small on LibriSpeech, and report the word error rate of what it generates.

Both must have the same tokenizer and the same number of mel bins: so have tiny to large-v2, but not large-v3.
Every option of Seq2SeqDistillationArguments is an option here.
"""

import sys
from dataclasses import dataclass, field

import jiwer
import numpy as np
import smoke
import torch
from datasets import Audio, load_dataset
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, HfArgumentParser, ProcessorMixin
from transformers.trainer_utils import EvalPrediction, set_seed

from hf_distill import Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer


@dataclass
class ScriptArguments:
    dataset: str = field(default="openslr/librispeech_asr", metadata={"help": "With columns audio and text."})
    dataset_config: str | None = field(default="clean", metadata={"help": "Which part of the dataset."})
    train_split: str = field(default="train.100", metadata={"help": "Its validation split is measured on."})
    language: str = field(default="english", metadata={"help": "What is spoken."})
    teacher: str = field(default="openai/whisper-medium", metadata={"help": "A folder or Hub id."})
    student: str = field(default="openai/whisper-small", metadata={"help": "A folder or Hub id."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


@dataclass
class Collator:
    """Sounds to mel spectrograms of 30 s, texts to padded labels."""

    processor: ProcessorMixin
    start_token: int
    longest: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        extractor, tokenizer = self.processor.feature_extractor, self.processor.tokenizer
        sounds = [row["audio"]["array"] for row in rows]
        batch = dict(extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt"))
        texts = [row["text"].lower() for row in rows]  # LibriSpeech is written in capitals
        labels = tokenizer(texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        ids = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        # The model puts the start token before the labels by itself.
        batch["labels"] = ids[:, 1:] if bool((ids[:, 0] == self.start_token).all()) else ids
        return batch


def measure(prediction: EvalPrediction, processor: ProcessorMixin) -> dict[str, float]:
    """Word error rate without case and punctuation: words wrong, missing and too many, over words spoken."""
    tokenizer = processor.tokenizer
    texts = []
    for ids in (prediction.label_ids, prediction.predictions):
        ids = np.where(ids == -100, tokenizer.pad_token_id, ids)
        texts.append([tokenizer.basic_normalize(x) for x in tokenizer.batch_decode(ids, skip_special_tokens=True)])
    return {"wer": jiwer.wer(*texts)}


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, Seq2SeqDistillationArguments), description=__doc__)
    parser.set_defaults(output_dir="whisper-student", alpha=0.5, temperature=2.0, learning_rate=1e-5, max_steps=5000)
    parser.set_defaults(per_device_train_batch_size=16, warmup_steps=0.1, save_total_limit=1)
    parser.set_defaults(eval_strategy="steps", eval_steps=1000, save_strategy="steps", save_steps=1000)
    parser.set_defaults(predict_with_generate=True, generation_max_length=225, bf16=torch.cuda.is_available())
    parser.set_defaults(remove_unused_columns=False, dataloader_num_workers=4)  # the collator reads audio and text
    if "--smoke" in sys.argv:
        parser.set_defaults(**smoke.SETTINGS, generation_max_length=16)
    script, args = parser.parse_args_into_dataclasses()
    if script.smoke:
        script.teacher, script.student, data = smoke.whisper()
    else:
        data = load_dataset(script.dataset, script.dataset_config).cast_column("audio", Audio(sampling_rate=16_000))
    processor = AutoProcessor.from_pretrained(script.student, language=script.language, task="transcribe")
    student = AutoModelForSpeechSeq2Seq.from_pretrained(script.student)
    student.generation_config.update(language=script.language, task="transcribe", forced_decoder_ids=None)
    set_seed(args.seed)
    trainer = Seq2SeqDistillationTrainer(
        model=student,
        teacher_model=script.teacher,
        teacher_processing_class=AutoProcessor.from_pretrained(script.teacher),
        args=args,
        train_dataset=data[script.train_split],
        eval_dataset=data["validation"],
        processing_class=processor,
        data_collator=Collator(processor, student.config.decoder_start_token_id, student.config.max_target_positions),
        compute_metrics=lambda prediction: measure(prediction, processor),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset=script.dataset)


if __name__ == "__main__":
    main()
