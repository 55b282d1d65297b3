"""`fused_loss=True` equals the plain path with adapters, checkpointing, a compiler, or autocast.

One process; several: `tests/distributed`. The plain path is the reference.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_distill import DistillationTrainer, Distiller, SettingError
from tests.heads import HEADS
from tests.trainer.logit_free import adapted
from tests.trainer.steps import in_double
from tests.trainer.tiny import PLAIN_STEP, arguments, update_difference, weights

HEAD = HEADS["llama_causal_lm"]
# PEFT asks transformers by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def trained(
    folder: Path, *, fused: bool | None, adapters: dict[str, Any] | None = None, double: bool = True, **given: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights after three steps of two micro-batches of ragged examples, and before."""
    student, teacher = HEAD.make(0, layers=2), HEAD.make(1, layers=2)
    if double:
        student, teacher = student.double(), teacher.double()
    if adapters is not None:
        student = adapted(student, **adapters)
    before = weights(student)
    steps = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = arguments(folder, fused_loss=fused, **steps, **{**PLAIN_STEP, "learning_rate": 0.1, **given})
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=HEAD.examples(12),
        data_collator=partial(in_double, HEAD) if double else HEAD.collate,
    )
    trainer.train()
    return weights(student), before


def apart(folder: Path, **given: Any) -> float:
    expected, before = trained(folder, fused=False, **given)
    found, _ = trained(folder, fused=True, **given)
    return update_difference(found, expected, before)


def test_adapters_on_the_blocks(tmp_path: Path) -> None:
    """With checkpointing, the usual way to train adapters; the head is frozen."""
    assert apart(tmp_path, adapters={}, activation_checkpointing=True) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    kind = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert apart(tmp_path, **kind) < 1e-6


@pytest.mark.parametrize("adapters", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_adapters_on_the_head_raise(adapters: dict[str, Any]) -> None:
    student, teacher = adapted(HEAD.make(0), **adapters), HEAD.make(1)
    distiller = Distiller(student, teacher, fused_loss=True)
    message = r"the output head of LlamaForCausalLM is a peft\..*, and not a plain nn.Linear \(an adapter on it, or "
    with pytest.raises(SettingError, match=message + r"quantised: leave it out of both\). Pass fused_loss=False"):
        distiller(student, HEAD.batch(2))


def test_bf16_autocast_is_as_precise_as_the_plain_path(tmp_path: Path) -> None:
    exact, before = trained(tmp_path, fused=False, double=False)
    plain, fused = (trained(tmp_path, fused=how, double=False, bf16=True)[0] for how in (False, True))
    assert update_difference(fused, exact, before) < 1.2 * update_difference(plain, exact, before)
    assert 0 < update_difference(fused, plain, before) < 0.03


def assert_compiled_once(backend: str) -> None:
    """Compare gradients with the plain path; only the first batch may compile anything."""
    head = HEADS["gpt2_causal_lm"]
    student, teacher = head.make(0).double().train(), head.make(1).double()
    compiled: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    model = torch.compile(student, backend=counting)
    ours, plain = (Distiller(student, teacher, fused_loss=how) for how in (True, False))
    graphs = []
    for seed in range(3):
        batch = in_double(head, head.examples(3, seed), pad_to=head.longest)
        gradients = []
        for distiller, called in ((plain, student), (ours, model)):
            student.zero_grad()
            distiller(called, batch).loss.backward()
            gradients.append({name: p.grad.clone() for name, p in student.named_parameters()})
        graphs.append(len(compiled))
        for name, expected in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7)
    assert graphs[0] > 0 and graphs[1:] == graphs[:1] * 2, graphs


# Dynamo checks every tensor with which it continues after a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_with_aot_eager() -> None:
    assert_compiled_once("aot_eager")


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
@pytest.mark.slow  # builds C++
def test_compiled_with_inductor() -> None:
    assert_compiled_once("inductor")
