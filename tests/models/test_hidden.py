"""Captured hidden states of every architecture equal transformers' `hidden_states` and the head's input."""

from __future__ import annotations

import pytest
import torch

from hf_distill.models.capture import ActivationCapture
from hf_distill.signals import ActivationKey
from tests.models.capturing import ALL, model_of, of_side, read, reads, sides_of, with_sides
from tests.students.models import LAYERS

# A norm follows the last block; transformers returns its output as the last hidden state.
NORM_SHOWN = ("GPT2", "Llama", "Qwen", "Gemma", "ModernBert", "T5", "Whisper")
CONVOLVED = "DebertaV2"  # a convolution follows the first block and is in hidden_states[1]
WINDOWS = "Longformer"  # pads internally; hidden_states has the padding removed


@pytest.mark.parametrize(("name", "side"), with_sides(ALL))
def test_block_k_is_hidden_state_k_plus_1(name: str, side: str | None) -> None:
    """The embeddings are the first hidden state; capturing does not change the forward."""
    model, batch = model_of(name), ALL[name].batch()
    wanted = reads("hidden", side, range(-1, LAYERS))
    seen, outputs = read(model, wanted, batch, output_hidden_states=True)
    shown = of_side(outputs, "hidden_states", side)
    assert len(shown) == LAYERS + 1 and set(seen) == set(wanted)
    for one in wanted:
        found, expected = seen[one], shown[one.layer + 1]
        if name.startswith(WINDOWS):
            found = found[:, : expected.shape[1]]
        exception = (name.startswith(NORM_SHOWN) and one.layer == LAYERS - 1) or (
            name.startswith(CONVOLVED) and one.layer == 0
        )
        assert torch.equal(found, expected) != exception, one
    with torch.no_grad():
        unread = model(**batch, output_hidden_states=True)
    for ours, theirs in zip(shown, of_side(unread, "hidden_states", side), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(first_tensor(outputs), first_tensor(unread))


def first_tensor(outputs: object) -> torch.Tensor:
    values = outputs.values()  # type: ignore[attr-defined]  # a ModelOutput
    return next(value for value in values if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(("name", "side"), with_sides(ALL))
def test_last_hidden_is_what_the_head_reads(name: str, side: str | None) -> None:
    """The output of the base model, including its last norm if it has one."""
    model, batch = model_of(name), ALL[name].batch()
    wanted = ActivationKey("last_hidden", 0, side)
    seen, outputs = read(model, [wanted], batch, output_hidden_states=True)
    base = model.base_model
    if side is None and "last_hidden_state" in outputs:
        expected = outputs["last_hidden_state"]
    elif base is model or name == "BertForMultipleChoice":  # no base model; choices folded into the batch
        expected = of_side(outputs, "hidden_states", side)[-1]
    else:
        with torch.no_grad():
            of_base = base(**batch)
        expected = of_base["encoder_last_hidden_state" if side == "encoder" else "last_hidden_state"]
    assert torch.equal(seen[wanted], expected)


@pytest.mark.parametrize("name", ALL)
def test_blocks_of_every_architecture_are_found(name: str) -> None:
    """Compared with the paths, counts, widths and head counts that the tables of `inherit` list by hand."""
    model = model_of(name)
    for (argument, path), side in zip(ALL[name].stacks.items(), sides_of(name), strict=True):
        blocks = ActivationCapture(model, "student").blocks(side)
        assert (blocks.length, blocks.width, blocks.heads) == (LAYERS, 16, 2), argument
        assert blocks.shared == (path is None)
        if path is not None:
            assert blocks.path == path
            assert [id(block) for block in blocks.modules] == [id(block) for block in model.get_submodule(path)]


@pytest.mark.parametrize("name", [name for name in ALL if len(sides_of(name)) == 2])
def test_the_default_side_is_the_decoder(name: str) -> None:
    seen, _ = read(
        model_of(name), [ActivationKey("hidden", 1), ActivationKey("hidden", 1, "decoder")], ALL[name].batch()
    )
    assert torch.equal(seen[ActivationKey("hidden", 1)], seen[ActivationKey("hidden", 1, "decoder")])
    assert len(seen) == 2


def test_both_sides_are_captured_in_one_forward() -> None:
    name = "BartForConditionalGeneration"
    wanted = [*reads("hidden", "encoder"), *reads("hidden", "decoder"), *reads("attention", "decoder", [2])]
    seen, outputs = read(model_of(name), wanted, ALL[name].batch(), output_hidden_states=True)
    assert set(seen) == set(wanted)
    for side in ("encoder", "decoder"):
        assert torch.equal(seen[ActivationKey("hidden", 2, side)], of_side(outputs, "hidden_states", side)[3])
