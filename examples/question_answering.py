"""Distil a BERT-large fine-tuned on SQuAD 1.1 into a DistilBERT, and report the answers' exact match and F1.

Every option of DistillationArguments is an option here."""

import re
import sys
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import smoke
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser
from transformers.trainer_utils import EvalPrediction, set_seed

from hf_distill import DistillationArguments, DistillationTrainer


@dataclass
class ScriptArguments:
    teacher: str = field(default="google-bert/bert-large-uncased-whole-word-masking-finetuned-squad")
    student: str = field(default="distilbert/distilbert-base-uncased", metadata={"help": "A folder or Hub id."})
    max_length: int = field(default=384, metadata={"help": "Tokens in a window over a long context."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


def windows(rows: dict, tokenizer: AutoTokenizer, max_length: int) -> dict:
    """Overlapping windows over each context, and where in each the answer is: 0, the first token, where it is not."""
    ways = {"stride": max_length // 3, "return_overflowing_tokens": True, "return_offsets_mapping": True}
    shown = tokenizer(rows["question"], rows["context"], truncation="only_second", max_length=max_length, **ways)
    owners, positions = shown.pop("overflow_to_sample_mapping"), []
    for window, owner in enumerate(owners):
        begin, text = (rows["answers"][owner][key][0] for key in ("answer_start", "text"))
        parts = zip(shown["offset_mapping"][window], shown.sequence_ids(window), strict=True)
        offsets = shown["offset_mapping"][window] = [[*o] if part == 1 else [-1, -1] for o, part in parts]
        starts = [i for i, (a, b) in enumerate(offsets) if a <= begin < b]
        ends = [i for i, (a, b) in enumerate(offsets) if a < begin + len(text) <= b]
        positions.append([starts[0], ends[0]] if starts and ends else [0, 0])
    shown["start_positions"], shown["end_positions"] = map(list, zip(*positions, strict=True))
    return {**shown, "id": [rows["id"][owner] for owner in owners]}


def measure(prediction: EvalPrediction, shown: Dataset, data: Dataset, longest: int = 30) -> dict[str, float]:
    """Exact match and F1 in percent, as SQuAD's own script counts them, of the best span in a question's windows."""
    contexts = dict(zip(data["id"], data["context"], strict=True))
    best = dict.fromkeys(contexts, (-np.inf, ""))
    for start, end, offsets, row in zip(*prediction.predictions, shown["offset_mapping"], shown["id"], strict=True):
        readable = np.array([a >= 0 for a, _ in offsets])
        allowed = np.tril(np.triu(np.outer(readable, readable)), longest - 1)  # no end before its start
        scores = np.where(allowed, start[: len(offsets), None] + end[None, : len(offsets)], -np.inf)
        i, j = np.unravel_index(scores.argmax(), scores.shape)
        best[row] = max(best[row], (float(scores[i, j]), contexts[row][offsets[i][0] : offsets[j][1]]))
    found = [max(compare(best[row["id"]][1], text) for text in row["answers"]["text"]) for row in data]
    return dict(zip(("exact_match", "f1"), (100 * np.mean(found, axis=0)).tolist(), strict=True))


def compare(answer: str, gold: str) -> tuple[float, float]:
    """Exact match and F1 over words; case, punctuation and articles do not count."""
    bare = (re.sub(r"[!-/:-@\[-`{-~]", "", text.lower()) for text in (answer, gold))
    mine, theirs = (re.sub(r"\b(a|an|the)\b", " ", text).split() for text in bare)
    return float(mine == theirs), 2 * (Counter(mine) & Counter(theirs)).total() / max(1, len(mine) + len(theirs))


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, DistillationArguments), description=__doc__)
    parser.set_defaults(output_dir="squad-student", alpha=0.9, per_device_train_batch_size=16, warmup_steps=0.06)
    parser.set_defaults(eval_strategy="epoch", save_strategy="epoch", bf16=torch.cuda.is_available())
    if "--smoke" in sys.argv:
        parser.set_defaults(**smoke.SETTINGS, max_length=48)
    script, args = parser.parse_args_into_dataclasses()
    if script.smoke:
        script.teacher, script.student, data = smoke.squad()
    else:
        data = load_dataset("rajpurkar/squad")
    # Same vocabulary. The teacher's also makes token_type_ids; the trainer keeps them from a student without them.
    tokenizer, teacher_tokenizer = (AutoTokenizer.from_pretrained(path) for path in (script.student, script.teacher))
    options = {"batched": True, "remove_columns": data["train"].column_names}
    shown = data.map(lambda rows: windows(rows, teacher_tokenizer, script.max_length), **options)
    set_seed(args.seed)
    trainer = DistillationTrainer(
        model=AutoModelForQuestionAnswering.from_pretrained(script.student),
        teacher_model=script.teacher,
        teacher_processing_class=teacher_tokenizer,
        args=args,
        train_dataset=shown["train"],
        eval_dataset=shown["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(teacher_tokenizer),
        compute_metrics=lambda prediction: measure(prediction, shown["validation"], data["validation"]),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset="rajpurkar/squad")


if __name__ == "__main__":
    main()
