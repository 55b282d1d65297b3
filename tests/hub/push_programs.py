"""The programs of the push tests: train two steps, push, and leave files for the tests.

The working folder is the test's. Each push has a name: its output folder and its repository. What
`save_pretrained` of the same student and processor writes is left under `as-saved/<name>`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from huggingface_hub import ModelCard

from hf_distill import DistillationArguments, DistillationTrainer
from tests.hub.tiny import bert, sentences, tokenizer

TEACHER, BASE = "secret-teacher", "secret-base"
"""Relative folders: spelled like Hub ids, yet on this disk."""


def accuracy(prediction: tf.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def student_from_folder() -> tf.PreTrainedModel:
    bert("SequenceClassification").save_pretrained(BASE)
    return tf.AutoModelForSequenceClassification.from_pretrained(BASE)


def trainer_of(model: Any, name: str, **settings: Any) -> DistillationTrainer:
    """A trainer whose teacher is a folder on this disk."""
    bert("SequenceClassification", seed=1, hidden_size=32).save_pretrained(TEACHER)
    words = tokenizer()
    words.save_pretrained(TEACHER)
    arguments = DistillationArguments(
        output_dir=name, max_steps=2, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", disable_tqdm=True, temperature=2.5, alpha=0.75, logging_steps=1,
        **{"save_strategy": "no", **settings},
    )  # fmt: skip
    return DistillationTrainer(
        model=model,
        teacher_model=str(Path(TEACHER).absolute()),
        args=arguments,
        train_dataset=sentences(words),
        eval_dataset=sentences(words, 4),
        processing_class=words,
        compute_metrics=accuracy,
    )


def leave_saved(trainer: DistillationTrainer, name: str) -> None:
    trainer.model.save_pretrained(f"as-saved/{name}")
    trainer.processing_class.save_pretrained(f"as-saved/{name}")


def by_hand() -> None:
    """Push before training, then train, evaluate and push again, elsewhere."""
    trainer = trainer_of(student_from_folder(), "untrained")
    trainer.push_to_hub()
    leave_saved(trainer, "untrained")

    trainer = trainer_of(student_from_folder(), "trained")
    Path("trained", "notes of the user.txt").write_text("not for the Hub")
    leave_card("trained")
    trainer.train()
    metrics = trainer.evaluate()
    trainer.push_to_hub(dataset="Nine words")
    leave_saved(trainer, "trained")
    Path("metrics.json").write_text(json.dumps(metrics))
    torch.save(logits_of(trainer.model), "logits.pt")


def leave_card(name: str) -> None:
    """Write a README.md like that of a user."""
    Path(name).mkdir(exist_ok=True)
    Path(name, "README.md").write_text("---\nlicense: mit\ntags:\n- theirs\n---\n\n# Mine\n")


def at_each_save(model: Any, name: str, strategy: str) -> None:
    trainer = trainer_of(
        model, name, push_to_hub=True, hub_strategy=strategy, save_strategy="steps",
        save_steps=1, hub_always_push=True,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    leave_saved(trainer, name)


def while_training() -> None:
    """Push at each save: the student, and in another run its checkpoint too."""
    at_each_save(student_from_folder(), "every-save", "every_save")
    at_each_save(student_from_folder(), "with-checkpoint", "checkpoint")


def adapters() -> None:
    """LoRA on a base from the Hub, and on one from this disk."""
    from peft import LoraConfig, get_peft_model

    student_from_folder().push_to_hub("small-base")
    tokenizer().push_to_hub("small-base")
    for name, base in (("adapter", "tiny-user/small-base"), ("local-adapter", BASE)):
        leave_card(name)
        model = tf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        settings = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
        at_each_save(get_peft_model(model, settings), name, "every_save")
    at_each_save(get_peft_model(model, settings), "adapter-checkpoint", "checkpoint")


def everything() -> None:
    """All pushes, into one Hub from one folder."""
    by_hand()
    while_training()
    adapters()


def logits_of(model: torch.nn.Module, words: Any = None) -> torch.Tensor:
    batch = (words or tokenizer())("put your text", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def use(user: str, names: Sequence[str]) -> None:
    """Print the output of the program on each card, and the logits of the pushed student, as JSON.

    Each program is run unchanged, in its own namespace.
    """
    model = tf.AutoModelForSequenceClassification.from_pretrained(f"{user}/trained")
    words = tf.AutoTokenizer.from_pretrained(f"{user}/trained")
    printed = {}
    for name in names:
        text = ModelCard.load(f"{user}/{name}").text.split("```python\n")[1].split("```")[0]
        with contextlib.redirect_stdout(io.StringIO()) as written:
            exec(compile(text, f"the card of {name}", "exec"), {})
        printed[name] = written.getvalue()
    print(json.dumps({"cards": printed, "logits": logits_of(model, words).tolist()}))


def main(user: str, names: Sequence[str]) -> None:
    """Everything is pushed by a fork of this process, and used by this one, with nothing in its cache."""
    child = os.fork()
    if child == 0:
        try:
            everything()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    shutil.rmtree(os.environ["HF_HOME"])
    use(user, names)
