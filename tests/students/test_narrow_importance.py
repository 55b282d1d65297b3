"""Which units `narrow` keeps: scores against slow references, dead units, groups of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from hf_distill.students.narrow.narrow import narrow
from tests.students.models import MODELS, reported
from tests.students.narrow_models import N_HEADS, teacher_of
from tests.students.projection_models import OTHERS

BERT, LLAMA, T5 = "BertForSequenceClassification", "LlamaForCausalLM", "T5EncoderModel"


def inputs_of(model: Any, module: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the input of a module."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0]


def test_activation_is_the_size_of_a_neurons_contribution() -> None:
    """Neuron j contributes x_nj times column j of the matrix that reads it at position n; padding does not count."""
    teacher, batch = teacher_of(BERT, layers=1), MODELS[BERT].batch()
    teacher.requires_grad_(False)
    module = "bert.encoder.layer.0.output.dense"
    x, w = inputs_of(teacher, module, batch).double(), teacher.get_submodule(module).weight.double()
    scores = []
    for j in range(32):
        read = [(b, t) for b in range(2) for t in range(6) if batch["attention_mask"][b, t]]
        scores.append(sum(float((x[b, t, j] * w[:, j]).square().sum()) for b, t in read))
    best = sorted(range(32), key=lambda j: -scores[j])[:7]
    _, report = reported(narrow(teacher, intermediate=7, data=[batch]))
    assert report.kept[module] == tuple(sorted(best)) and report.importance == "activation"
    everywhere = dict(batch, attention_mask=torch.ones_like(batch["attention_mask"]))
    assert not torch.equal(x, inputs_of(teacher, module, everywhere).double())


def test_activation_is_the_size_of_a_heads_contribution() -> None:
    """Over two batches: the block of a head times its columns of the matrix that reads it."""
    teacher = teacher_of("ViTForImageClassification", layers=1)
    image = MODELS["ViTForImageClassification"].batch()
    batches = [image, {"pixel_values": image["pixel_values"].flip(0)[:1] * 2}]
    module = "vit.layers.0.attention.o_proj"
    w = teacher.get_submodule(module).weight.double()
    scores = torch.zeros(N_HEADS)
    for batch in batches:
        x = inputs_of(teacher, module, batch).double()
        for head in range(N_HEADS):
            block = slice(4 * head, 4 * head + 4)
            scores[head] += (x[..., block] @ w[:, block].T).square().sum()
    _, report = reported(narrow(teacher, heads=2, data=iter(batches)))
    assert report.kept[module] == tuple(sorted(scores.argsort(descending=True)[:2].tolist()))


@pytest.mark.parametrize("kind", ["heads", "intermediate"])
def test_gradient_is_the_change_of_the_loss_by_the_gate(kind: str) -> None:
    """By finite differences in float64: the loss with the units of each example scaled by 1 ± 1e-4."""
    name = "ViTForImageClassification"
    teacher = teacher_of(name, layers=1).double().requires_grad_(False)
    batch = {"pixel_values": MODELS[name].batch()["pixel_values"].double(), "labels": torch.tensor([2, 0])}
    module = {"heads": "vit.layers.0.attention.o_proj", "intermediate": "vit.layers.0.mlp.fc2"}[kind]
    units = {"heads": N_HEADS, "intermediate": 32}[kind]
    scores = torch.zeros(units, dtype=torch.float64)
    for unit in range(units):
        for example in range(2):
            one = {key: value[example : example + 1] for key, value in batch.items()}
            up, down = (loss_with_gate(teacher, module, units, unit, gate, one) for gate in (1 + 1e-4, 1 - 1e-4))
            scores[unit] += abs(up - down) / 2e-4
    for keep in (1, 2, 3):
        _, report = reported(narrow(teacher, **{kind: keep}, data=[batch], importance="gradient"))
        assert report.kept[module] == tuple(sorted(scores.argsort(descending=True)[:keep].tolist()))
    assert "chosen by gradient" in str(report)


def loss_with_gate(model: Any, module: str, units: int, unit: int, gate: float, batch: Any) -> float:
    def scaled(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        gates = torch.ones(units, 1, dtype=torch.float64)
        gates[unit] = gate
        return ((args[0].unflatten(-1, (units, -1)) * gates).flatten(-2), *args[1:])

    hook = model.get_submodule(module).register_forward_pre_hook(scaled)
    loss = float(model(**batch).loss)
    hook.remove()
    return loss


@pytest.mark.parametrize("importance", ["activation", "gradient"])
def test_dead_units_are_not_kept(importance: str) -> None:
    """Heads 0 and 2 output 0, some neurons are always 0 or never read, some channels are always 0."""
    teacher = teacher_of(LLAMA, num_key_value_heads=4)
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.self_attn.v_proj.weight[[0, 1, 2, 3, 8, 9, 10, 11]] = 0
            layer.mlp.up_proj.weight[:10] = 0
            layer.mlp.down_proj.weight[:, 10:18] = 0
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                matrix.weight[[1, 5, 6]] = 0
        teacher.model.embed_tokens.weight[:, [1, 5, 6]] = 0
    batch = MODELS[LLAMA].batch()
    batch["labels"] = batch["input_ids"]
    _, report = reported(narrow(teacher, hidden=12, heads=2, intermediate=14, data=[batch], importance=importance))
    for layer in range(2):
        assert report.kept[f"model.layers.{layer}.self_attn.o_proj"] == (1, 3)
        assert report.kept[f"model.layers.{layer}.mlp.down_proj"] == tuple(range(18, 32))
    assert len(report.kept["hidden states"]) == 12 and not {1, 5, 6} & set(report.kept["hidden states"])


def test_channels_that_are_zero_change_only_the_mean_square() -> None:
    """RMSNorm divides by the root of the mean over channels: without the 8 of 16 that are 0 it is √2 times as large.

    With norm weights larger by √2 to make up for that (and no eps), the student is the teacher.
    """
    teacher = teacher_of(LLAMA, rms_norm_eps=0.0)
    dead = [0, 1, 2, 3, 4, 5, 6, 7]
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.self_attn.o_proj.weight[dead] = 0
            layer.mlp.down_proj.weight[dead] = 0
        teacher.model.embed_tokens.weight[:, dead] = 0
    batch = MODELS[LLAMA].batch()
    student = narrow(teacher, hidden=8, data=[batch])
    with torch.no_grad():
        for module_name, module in student.named_modules():
            if module_name.endswith("norm"):
                module.weight.mul_(2**0.5)
        assert_close(student(**batch).logits, teacher(**batch).logits, rtol=1e-4, atol=1e-5)


def test_heads_that_share_a_key_value_head() -> None:
    """Of 4 heads on 2 the best of each pair; on 1 both of the better pair. The pairs are (0, 1) and (2, 3)."""
    teacher = teacher_of(LLAMA, layers=1)
    with torch.no_grad():
        for head, factor in enumerate((3.0, 2.0, 0.5, 1.0)):
            teacher.model.layers[0].self_attn.o_proj.weight[:, 4 * head : 4 * head + 4] = factor * torch.eye(16)[:, :4]
    batch = MODELS[LLAMA].batch()
    scores = inputs_of(teacher, "model.layers.0.self_attn.o_proj", batch).unflatten(-1, (4, 4)).square()
    scores = scores[batch["attention_mask"].bool()].sum((0, 2)) * torch.tensor([9.0, 4.0, 0.25, 1.0])
    of_pairs = [int(scores[:2].argmax()), 2 + int(scores[2:].argmax())]
    spread, report = reported(narrow(teacher, heads=2, data=[batch]))
    assert report.kept["model.layers.0.self_attn.o_proj"] == tuple(of_pairs)
    assert (spread.config.num_attention_heads, spread.config.num_key_value_heads) == (2, 2)
    pair, report = reported(narrow(teacher, heads=2, key_value_heads=1, data=[batch]))
    better = (0, 1) if scores[:2].sum() > scores[2:].sum() else (2, 3)
    assert report.kept["model.layers.0.self_attn.o_proj"] == better
    assert (pair.config.num_key_value_heads, pair.config.head_dim) == (1, 4)
    attention, theirs = pair.model.layers[0].self_attn, teacher.model.layers[0].self_attn
    start = 4 * (better[0] // 2)
    assert torch.equal(attention.k_proj.weight, theirs.k_proj.weight[start : start + 4])
    assert torch.equal(attention.q_proj.weight, theirs.q_proj.weight[4 * better[0] : 4 * better[0] + 8])


def test_a_convolution_in_groups_keeps_equally_many_of_each() -> None:
    """Its weight, stored as length and direction, equals the teacher's weight at the kept channels."""
    name = "Wav2Vec2ForCTC"
    teacher = teacher_of(name)
    student, report = reported(narrow(teacher, hidden=12, heads=3, data=[MODELS[name].batch()]))
    kept = report.kept["hidden states"]
    halves = [[c for c in kept if c < 8], [c - 8 for c in kept if c >= 8]]
    assert [len(half) for half in halves] == [6, 6]
    ours, theirs = (model.wav2vec2.encoder.pos_conv_embed.conv.weight for model in (student, teacher))
    parts = [half[rows][:, rows] for half, rows in zip(theirs.split(8), halves, strict=True)]
    assert_close(ours, torch.cat(parts))


def test_whisper_keeps_the_alignment_heads_that_stay() -> None:
    name = "WhisperForConditionalGeneration"
    teacher = teacher_of(name)
    teacher.generation_config.alignment_heads = [[0, head] for head in range(4)] + [[1, 2]]
    student, report = reported(narrow(teacher, hidden=12, heads=3, data=[MODELS[name].batch()]))
    kept = report.kept["model.decoder.layers.0.encoder_attn.out_proj"]
    other = report.kept["model.decoder.layers.1.encoder_attn.out_proj"]
    expected = [[0, 0], [0, 1], [0, 2]] + ([[1, other.index(2)]] if 2 in other else [])
    assert len(kept) == 3 and student.generation_config.alignment_heads == expected
    assert f"alignment_heads: {len(expected)} of 5 were kept" in str(report)


def test_data_may_have_further_columns() -> None:
    _, report = reported(
        narrow(teacher_of(BERT), intermediate=8, data=[{**MODELS[BERT].batch(), "idx": torch.ones(2)}])
    )
    assert len(report.kept) == 2 and "config.intermediate_size: 8 of 32" in str(report)
    teacher = teacher_of(T5)
    assert narrow(teacher, heads=2, hidden=6, data=[MODELS[BERT].batch()]).config.d_kv == teacher.config.d_kv


def test_a_factor_that_depends_on_the_width_is_noted() -> None:
    teacher = teacher_of("BartForConditionalGeneration", scale_embedding=True)
    data = [MODELS["BartForConditionalGeneration"].batch()]
    _, report = reported(narrow(teacher, hidden=4, heads=1, data=data))
    assert any("embed_scale is 2, in the teacher 4" in note for note in report.notes)


def test_a_factor_in_a_buffer_follows_the_students_width(tmp_path: Path) -> None:
    """Gemma 2 multiplies its embeddings by √hidden, which is not saved: the same in memory and after loading."""
    teacher, batch = OTHERS["Gemma2"].make(2), OTHERS["Gemma2"].batch()
    student, report = reported(narrow(teacher, hidden=12, heads=2, data=[batch]))
    student.save_pretrained(tmp_path)
    again = OTHERS["Gemma2"].model_class.from_pretrained(tmp_path).eval()
    assert float(student.model.embed_tokens.embed_scale) == pytest.approx(12**0.5)
    assert any("embed_scale is 3.4641, in the teacher 4" in note for note in report.notes)
    with torch.no_grad():
        assert_close(again(**batch).logits, student(**batch).logits)


@pytest.mark.parametrize("importance", ["activation", "gradient"])
def test_the_dtype_is_the_teachers(importance: str) -> None:
    teacher, data = teacher_of(BERT).to(torch.bfloat16), [{**MODELS[BERT].batch(), "labels": torch.tensor([0, 2])}]
    student = narrow(teacher, hidden=12, heads=3, intermediate=8, data=data, importance=importance)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.isfinite(student(**data[0]).logits).all()
