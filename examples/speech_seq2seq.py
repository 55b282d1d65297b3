"""Distil a Whisper medium into a Whisper small on LibriSpeech, and report the word error rate of what it generates.

Both must have the same tokenizer and the same number of mel bins: so have tiny to large-v2, but not large-v3.
Data of your own: --dataset FOLDER, with audio files and SPLIT/metadata.csv (file_name,text), or of parquet files.
Every option of Seq2SeqDistillationArguments is an option here.
"""

import sys
from dataclasses import dataclass, field

import jiwer
import numpy as np
import own_data
import smoke
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, HfArgumentParser, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction, set_seed

from hf_distill import Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer
from hf_distill.data.audio import AudioFeatures


@dataclass
class ScriptArguments:
    dataset: str = field(default="openslr/librispeech_asr", metadata={"help": "Folder or Hub id: audio and text."})
    dataset_config: str | None = field(default=None, metadata={"help": "Which part of it; clean for LibriSpeech."})
    train_split: str | None = field(default=None, metadata={"help": "train.100 for LibriSpeech, else train."})
    language: str = field(default="english", metadata={"help": "What is spoken."})
    teacher: str = field(default="openai/whisper-medium", metadata={"help": "A folder or Hub id."})
    student: str = field(default="openai/whisper-small", metadata={"help": "A folder or Hub id."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


@dataclass
class Collator:
    """Sounds to mel spectrograms of 30 s, texts to padded labels."""

    features: AudioFeatures
    tokenizer: PreTrainedTokenizerBase
    start_token: int
    longest: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.features([row["audio"] for row in rows])
        texts = [row["text"].lower() if row["text"].isupper() else row["text"] for row in rows]  # as LibriSpeech is
        cut = {"truncation": True, "max_length": self.longest}
        labels = self.tokenizer(texts, padding=True, return_tensors="pt", **cut)
        ids = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        # The model puts the start token before the labels by itself.
        batch["labels"] = ids[:, 1:] if bool((ids[:, 0] == self.start_token).all()) else ids
        return batch


def measure(prediction: EvalPrediction, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Word error rate without case and punctuation: words wrong, missing and too many, over words spoken."""
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
        train, held_out = data.values()
    else:
        train, held_out = own_data.recordings(script.dataset, script.dataset_config, script.train_split, "text")
    student = AutoModelForSpeechSeq2Seq.from_pretrained(script.student)
    multilingual = getattr(student.generation_config, "is_multilingual", True)  # whisper-small.en is not
    spoken = {"language": script.language, "task": "transcribe"} if multilingual else {}
    for name, value in {**spoken, "forced_decoder_ids": None}.items():  # `update` leaves aside what it does not know
        setattr(student.generation_config, name, value)
    processor = AutoProcessor.from_pretrained(script.student, **spoken)
    start, longest = student.config.decoder_start_token_id, student.config.max_target_positions
    set_seed(args.seed)
    trainer = Seq2SeqDistillationTrainer(
        model=student,
        teacher_model=script.teacher,
        teacher_processing_class=AutoProcessor.from_pretrained(script.teacher),
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        data_collator=Collator(AudioFeatures(processor), processor.tokenizer, start, longest),
        compute_metrics=lambda prediction: measure(prediction, processor.tokenizer),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset=script.dataset)


if __name__ == "__main__":
    main()
