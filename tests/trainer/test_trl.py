"""`class Mine(DistillationMixin, SFTTrainer)` with the real TRL, if installed (extra `peers`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_distill import DistillationMixin
from hf_distill.trainer.arguments import DistillationSettings
from tests.heads import HEADS
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import QUIET, softened_kl, weights

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL announces its own changes

HEAD, T = HEADS["llama_causal_lm"], 2.0
WORDS = [" ".join(f"w{3 + (5 * i + 3 * j) % 30}" for j in range(2 + i % 4)) for i in range(8)]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w1 {{ m['content'] }} w2 "
    "{% else %}{% generation %}{{ m['content'] }} w3 {% endgeneration %}{% endif %}{% endfor %}"
)


@dataclass
class Arguments(DistillationSettings, trl.SFTConfig):  # type: ignore[misc, name-defined]  # a class of TRL's
    """The example in docs/trainer.md."""


class Mine(DistillationMixin, trl.SFTTrainer):  # type: ignore[misc, name-defined]  # a class of TRL's
    """The class that a user writes."""


def words() -> Any:
    made = tokenizer()
    made.eos_token, made.chat_template = "w39", TEMPLATE
    return made


def messages() -> Dataset:
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in zip(WORDS, WORDS[::-1], strict=True)
    ]
    return Dataset.from_dict({"messages": turns})


DATA: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": (lambda: Dataset.from_dict({"text": WORDS}), {}),
    "packed": (lambda: Dataset.from_dict({"text": WORDS}), {"packing": True}),
    "prompt_and_completion": (
        lambda: Dataset.from_dict({"prompt": [f"{one} " for one in WORDS], "completion": WORDS[::-1]}),
        {},
    ),
    "messages": (messages, {}),
    "assistants_alone": (messages, {"assistant_only_loss": True}),
    "ids": (lambda: Dataset.from_dict({"input_ids": [words()(one)["input_ids"] for one in WORDS]}), {}),
}


def args(folder: Path, kind: Any = Arguments, **changed: Any) -> Any:
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 0.1, "bf16": False}
    more = {"max_length": 32, "max_steps": 1, "per_device_train_batch_size": 8, "gradient_checkpointing": False}
    return kind(output_dir=str(folder / "out"), logging_steps=1, **QUIET, **plain, **more, **changed)


def texts_of(prepared: Any) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of each text that the trainer prepared, unpacked."""
    found = []
    for row in prepared:
        at = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            found.append((row["input_ids"][at : at + length], row["labels"][at : at + length]))
            at += length
    return found


def by_hand(texts: list[tuple[list[int], list[int]]], alpha: float) -> tuple[float, dict[str, torch.Tensor]]:
    ours, theirs = HEAD.make(1).double(), HEAD.make(2).double().eval()
    own, apart = [], []
    for ids, labels in texts:
        target = torch.tensor(labels)[1:]
        logits, expected = (model(torch.tensor([ids])).logits[0, :-1][target != -100] for model in (ours, theirs))
        own.append(torch.nn.functional.cross_entropy(logits, target[target != -100], reduction="none"))
        apart.append(softened_kl(logits, expected.detach(), T))
    loss = (1 - alpha) * torch.cat(own).mean() + alpha * torch.cat(apart).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter -= 0.1 * parameter.grad
    return loss.item(), weights(ours)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", DATA)
def test_the_step_equals_the_one_by_hand(tmp_path, name: str, alpha: float) -> None:
    made, settings = DATA[name]
    student = HEAD.make(1)
    trainer = Mine(
        model=student,
        teacher_model=HEAD.make(2),
        args=args(tmp_path, alpha=alpha, temperature=T, **settings),
        processing_class=words(),
        teacher_processing_class=words(),
        train_dataset=made(),
    )
    loss, expected = by_hand(texts_of(trainer.train_dataset), alpha)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    for key, value in weights(student).items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-3, atol=1e-5)


def test_alpha_0_equals_sft_trainer(tmp_path) -> None:
    """Weights and logs (entropy, token accuracy, tokens) bit for bit."""
    found = []
    for cls, kind, more in ((trl.SFTTrainer, trl.SFTConfig, {}), (Mine, Arguments, {"alpha": 0.0})):
        student = HEAD.make(1)
        made = args(tmp_path, kind, **more)
        made.max_steps, made.per_device_train_batch_size = 4, 4
        trainer = cls(model=student, args=made, processing_class=words(), train_dataset=DATA["text"][0]())
        trainer.train()
        logged = [
            {name: value for name, value in entry.items() if name != "loss/labels" and not name.startswith("train_")}
            for entry in trainer.state.log_history
        ]
        found.append((weights(student), logged))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(found[0][0][name], value) for name, value in found[1][0].items())
