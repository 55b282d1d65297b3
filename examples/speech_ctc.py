"""Distil a large Wav2Vec2 (CTC) into one with half of its layers, on LibriSpeech, and report the word error rate.

Data of your own: --dataset FOLDER, with audio files and SPLIT/metadata.csv (file_name,text), or of parquet files.
Every option of DistillationArguments is an option here.
"""

import sys
from dataclasses import dataclass, field

import jiwer
import numpy as np
import own_data
import smoke
import torch
from transformers import AutoModelForCTC, AutoProcessor, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalPrediction, set_seed

from hf_distill import DistillationArguments, DistillationTrainer
from hf_distill.data.audio import AudioFeatures


@dataclass
class ScriptArguments:
    dataset: str = field(default="openslr/librispeech_asr", metadata={"help": "Folder or Hub id: audio and text."})
    dataset_config: str | None = field(default=None, metadata={"help": "Which part of it; clean for LibriSpeech."})
    train_split: str | None = field(default=None, metadata={"help": "train.100 for LibriSpeech, else train."})
    # A model whose processor makes an attention mask: without one it cannot be told which frames are padding.
    teacher: str = field(default="facebook/wav2vec2-large-960h-lv60-self", metadata={"help": "A folder or Hub id."})
    student_layers: int = field(default=12, metadata={"help": "How many of the teacher's layers the student keeps."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


@dataclass
class Collator:
    """Sounds to padded samples with their mask, texts to padded labels."""

    features: AudioFeatures
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch, known = self.features([row["audio"] for row in rows]), {" ", *self.tokenizer.get_vocab()}
        texts = [row["text"].upper() if "A" in known else row["text"].lower() for row in rows]
        texts = ["".join(letter for letter in text if letter in known) for text in texts]
        labels = self.tokenizer(texts, padding=True, return_tensors="pt")
        batch["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        return batch


def measure(prediction: EvalPrediction, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Words wrong, missing and too many, over words spoken."""
    both, blank = (prediction.label_ids, prediction.predictions), tokenizer.pad_token_id
    spoken, heard = (np.where(ids == -100, blank, ids) for ids in both)
    return {"wer": jiwer.wer(tokenizer.batch_decode(spoken, group_tokens=False), tokenizer.batch_decode(heard))}


def thinned(teacher: str, layers: int) -> PreTrainedModel:
    """The teacher with so many of its layers, evenly spaced, the first and the last among them."""
    # A mean over utterances, not their sum: the learning rate then does not depend on the batch size.
    options = {"ctc_loss_reduction": "mean", "ctc_zero_infinity": True, "layerdrop": 0.0}
    student = AutoModelForCTC.from_pretrained(teacher, **options)
    encoder = student.base_model.encoder
    kept = np.linspace(0, len(encoder.layers) - 1, layers).round().astype(int)
    encoder.layers = torch.nn.ModuleList(encoder.layers[i] for i in kept)
    student.config.num_hidden_layers = layers
    student.freeze_feature_encoder()  # its convolutions are the teacher's, and stay so
    return student


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DistillationArguments), description=__doc__)
    parser.set_defaults(output_dir="wav2vec2-student", alpha=0.5, temperature=2.0, learning_rate=5e-5, max_steps=10000)
    parser.set_defaults(per_device_train_batch_size=16, warmup_steps=0.1, bf16=torch.cuda.is_available())
    parser.set_defaults(eval_strategy="steps", eval_steps=2000, save_strategy="steps", save_steps=2000)
    parser.set_defaults(remove_unused_columns=False, dataloader_num_workers=4, save_total_limit=1)
    if "--smoke" in sys.argv:
        parser.set_defaults(**smoke.SETTINGS, student_layers=2)
    script, args = parser.parse_args_into_dataclasses()
    if script.smoke:
        script.teacher, data = smoke.wav2vec2()
        train, held_out = data.values()
    else:
        train, held_out = own_data.recordings(script.dataset, script.dataset_config, script.train_split, "text")
    processor = AutoProcessor.from_pretrained(script.teacher)
    set_seed(args.seed)
    trainer = DistillationTrainer(
        model=thinned(script.teacher, script.student_layers),
        teacher_model=script.teacher,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        data_collator=Collator(AudioFeatures(processor), processor.tokenizer),
        compute_metrics=lambda prediction: measure(prediction, processor.tokenizer),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),  # not the whole vocabulary
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset=script.dataset)


if __name__ == "__main__":
    main()
