"""Captured attention scores, after mask and softmax, equal the attentions of the eager implementation."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_distill import SettingError
from hf_distill.functional.rows import BLOCKED
from hf_distill.models.capture import AttentionRecord
from hf_distill.signals import ActivationKey
from tests.heads import HEADS
from tests.models.capturing import ALL, model_of, of_side, read, reads, with_sides
from tests.models.test_hidden import first_tensor

OWN = ("Deberta", "MPNet", "WavLM", "Longformer")  # compute their own attention
NO_SDPA = ("Gemma2",)
HEARD = [name for name in ALL if not name.startswith(OWN)]


def implementation_of(name: str) -> str:
    return "eager" if name.startswith(NO_SDPA) else "sdpa"


@pytest.mark.parametrize(("name", "side"), with_sides(HEARD))
def test_scores_equal_the_attention_of_the_eager_model(name: str, side: str | None) -> None:
    """With padding, causal masks, grouped keys, T5's bias, BEiT's in its mask, windows and Gemma-2's soft cap."""
    model, batch = model_of(name, implementation_of(name)), ALL[name].batch()
    assert model.config._attn_implementation == implementation_of(name)
    seen, outputs = read(model, reads("attention", side), batch)
    with torch.no_grad():
        shown = model_of(name, "eager")(**batch, output_attentions=True)
        unread = model(**batch)
    assert torch.equal(first_tensor(outputs), first_tensor(unread))
    for layer, expected in enumerate(of_side(shown, "attentions", side)):
        record = seen[ActivationKey("attention", layer, side)]
        found = record.scores().masked_fill(~record.allowed(), BLOCKED).softmax(-1)
        assert found.shape == expected.shape
        apart = (found - expected).abs()
        mask = batch.get("attention_mask")
        if mask is not None and side != "decoder":  # a padded query still attends to something
            apart = apart * mask.bool()[:, None, :, None]
        assert apart.max() < 1e-5, f"block {layer}"


def test_leaving_out_a_part_of_the_scores_is_detected() -> None:
    """Without each of these parts, the comparison above fails."""

    def differs(name: str, side: str | None = None, **without: object) -> float:
        model, batch = model_of(name, implementation_of(name)), ALL[name].batch()
        record = read(model, reads("attention", side), batch)[0][ActivationKey("attention", 0, side)]
        other = dataclasses.replace(record, **without)
        return (record.scores() - other.scores()).abs().max().item()

    assert differs("T5ForConditionalGeneration", "encoder", bias=None) > 0.01
    assert differs("T5ForConditionalGeneration", "decoder", bias=None) > 0.01
    assert differs("Gemma2ForCausalLM", softcap=None) > 0.01
    assert differs("Gemma2ForCausalLM", scaling=8**-0.5) > 0.01
    assert differs("Beit_biased", mask=None) > 0.01


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "BertModel"])
def test_scores_do_not_depend_on_the_loaded_implementation(name: str) -> None:
    batch = ALL[name].batch()
    keep = batch["attention_mask"].bool()
    records = [read(model_of(name, how), reads("attention"), batch)[0] for how in ("eager", "sdpa")]
    pairs = keep[:, None, :, None] & keep[:, None, None, :]
    for one in reads("attention"):
        eager, sdpa = (found[one] for found in records)
        torch.testing.assert_close(eager.scores(), sdpa.scores(), atol=1e-5, rtol=1e-5)
        assert torch.equal(eager.allowed() & pairs, sdpa.allowed() & pairs)


def test_each_block_has_its_own_window() -> None:
    name = "Gemma3ForCausalLM"
    batch = {"input_ids": ALL[name].batch()["input_ids"]}
    seen, _ = read(model_of(name, "sdpa"), reads("attention"), batch)
    sliding, full = (seen[ActivationKey("attention", layer)].allowed()[0, 0] for layer in (0, 1))
    before = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(full, before)
    assert torch.equal(sliding, before & ~before.tril(-3))  # the position itself and the two before it


@pytest.mark.parametrize(("name", "side"), with_sides(name for name in ALL if name.startswith(OWN)))
def test_attention_that_cannot_be_captured_raises(name: str, side: str | None) -> None:
    with pytest.raises(
        SettingError, match=r"attention of block 2 of the student \(.*\): its attention does not go thr"
    ):
        read(model_of(name), [ActivationKey("attention", 2, side)], ALL[name].batch())


def record(**changed: object) -> AttentionRecord:
    """Return a record with two query heads over one key group, three positions."""
    queries = torch.arange(6.0).view(1, 2, 3, 1)
    plain = AttentionRecord(queries, torch.ones(1, 1, 3, 1), 1.0, bias=None, softcap=None, mask=None, causal=False)
    return dataclasses.replace(plain, **changed)


def test_allowed_pairs_for_every_kind_of_mask() -> None:
    everything = torch.ones(3, 3, dtype=torch.bool)
    additive = torch.zeros(1, 1, 3, 3).masked_fill(everything.triu(1), torch.finfo(torch.float32).min)
    assert torch.equal(record().allowed()[0, 0], everything)
    assert torch.equal(record(causal=True).allowed()[0, 0], everything.tril())
    assert torch.equal(record(causal=True, window=2).allowed()[0, 0], everything.tril().triu(-1))
    assert torch.equal(record(mask=additive).allowed()[0, 0], everything.tril())
    assert torch.equal(record(mask=everything.tril()[None, None]).allowed()[0, 0], everything.tril())
    padding = torch.tensor([[1, 1, 0]])  # the mask that flash attention receives
    assert torch.equal(record(mask=padding, causal=True).allowed()[0, 0], everything.tril() & padding.bool())


def test_scores_by_hand() -> None:
    """q·k·scaling + bias, then the soft cap c·tanh(x / c); one key group serves both heads."""
    torch.testing.assert_close(record(scaling=2.0).scores()[0, :, :, 0], torch.tensor([[0.0, 2, 4], [6, 8, 10]]))
    found = record(bias=torch.ones(1, 2, 3, 3), softcap=2.0).scores()[0, 0, :, 0]
    torch.testing.assert_close(found, 2 * torch.tanh(torch.tensor([1.0, 2.0, 3.0]) / 2))


# Masks that do not show their pairs.


class BlockMask:
    """A stand-in for flex attention's mask, which does not show its pairs before it is compiled."""


def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
    """A custom attention implementation that ignores its mask."""
    return sdpa_attention_forward(module, query, key, value, None, **settings)


def model_with(mask: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a Gemma-3 whose attention receives this mask for every batch."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "own", attend)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "own", lambda *_, **__: mask)
    return ALL["Gemma3ForCausalLM"].make(attn_implementation="own")


def test_a_window_passed_as_a_setting_is_respected(monkeypatch) -> None:
    """In flash attention, the window is an argument of the call."""
    batch = {"input_ids": torch.arange(1, 7)[None]}
    models = model_with(None, monkeypatch), model_of("Gemma3ForCausalLM", "sdpa")
    found, expected = (read(model, reads("attention"), batch)[0] for model in models)
    for one in reads("attention"):
        assert found[one].mask is None
        assert torch.equal(found[one].allowed()[0, 0], expected[one].allowed()[0, 0])


def test_a_mask_that_does_not_show_its_pairs_raises(monkeypatch) -> None:
    with pytest.raises(
        SettingError, match=r"Gemma3Attention: the mask is a BlockMask \(flex attention\), which hides it"
    ):
        read(model_with(BlockMask(), monkeypatch), reads("attention"), {"input_ids": torch.arange(1, 7)[None]})


def test_packed_sequences_under_flash_attention_raise(monkeypatch) -> None:
    """Detected by cumulative lengths or by positions that restart; increasing positions are one sequence."""
    model, wanted = HEADS["llama_causal_lm"].make(1), [ActivationKey("attention", 0)]
    packed = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    message = "sequences are packed under flash attention, .* load the model with attn_implementation='sdpa'"
    with pytest.raises(SettingError, match=f"AttentionMatch on LlamaAttention: {message}"):
        read(model, wanted, packed, cu_seq_lens_q=torch.tensor([0, 2, 4]))
    read(model, wanted, packed)  # SDPA's mask shows the documents
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_own", attend)
    model.model.layers[0].self_attn.config = SimpleNamespace(_attn_implementation="flash_own")
    with pytest.raises(SettingError, match=message):
        read(model, wanted, packed)
    read(model, wanted, {**packed, "position_ids": torch.arange(4)[None]})


def test_attention_sinks_raise() -> None:
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**tiny, **heads, pad_token_id=0))
    with pytest.raises(SettingError, match=r"GptOssAttention: it has attention sinks, .* Use RelationMatch"):
        read(model, [ActivationKey("attention", 0)], {"input_ids": torch.tensor([[3, 4, 5]])})
