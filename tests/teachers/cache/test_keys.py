"""Cache keys depend on the content of an example alone."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch

from hf_distill import DataError
from hf_distill.teachers.cache.keys import content_keys, key_columns
from tests.heads import HEADS
from tests.teachers.cache.built import left_padded

WITH_MASK = [name for name, head in HEADS.items() if head.mask is not None]


def key_of(batch: dict, columns: tuple[str, ...] = ("input_ids",)) -> list[list[int]]:
    return content_keys(batch, columns, main=columns[0]).tolist()


def test_a_key_by_hand() -> None:
    """blake2b, 16 bytes, of name, dtype and shape, and the tokens as little-endian 64-bit; big-endian halves."""
    text = b"input_ids:<i8:(2,);" + struct.pack("<qq", 7, 9)
    expected = struct.unpack(">QQ", hashlib.blake2b(text, digest_size=16).digest())
    batch = {"input_ids": torch.tensor([[7, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert key_of(batch) == [list(expected)]


@pytest.mark.parametrize("name", WITH_MASK)
def test_padding_order_and_integer_width_do_not_change_keys(name: str) -> None:
    head = HEADS[name]
    examples, main = head.examples(6), head.mask[1]
    columns = (main, "labels") if head.kind == "seq2seq" else (main,)
    keys = key_of(head.collate(examples), columns)
    assert len({tuple(key) for key in keys}) == 6
    assert key_of(head.collate(examples, head.longest + 5), columns) == keys
    assert key_of(head.collate(examples[::-1]), columns) == keys[::-1]
    alone = [key_of(head.collate([one]), columns)[0] for one in examples]
    assert alone == keys
    narrow = {k: v.int() if not v.is_floating_point() else v for k, v in head.collate(examples).items()}
    assert key_of(narrow, columns) == keys


def test_the_padding_side_does_not_change_keys() -> None:
    head = HEADS["llama_causal_lm"]
    examples = head.examples(6)
    assert key_of(left_padded(examples)) == key_of(head.collate(examples))


def test_content_changes_keys() -> None:
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 1, 1, 1]])
    variants = [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids.flip(1), "attention_mask": mask},
        {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0]])},  # shorter
        {"input_ids": ids[:, [0, 1, 0, 2]], "attention_mask": torch.tensor([[1, 1, 0, 1]])},  # 5 6 _ 7
        {"input_ids": ids[:, [0, 0, 1, 2]], "attention_mask": torch.tensor([[1, 0, 1, 1]])},  # 5 _ 6 7
        {"input_ids": ids},
    ]
    keys = [tuple(key_of(batch)[0]) for batch in variants]
    assert len(set(keys[:5])) == 5
    assert keys[5] == keys[0]  # without a mask, all of it is content
    second = {**variants[0], "token_type_ids": torch.tensor([[0, 0, 1, 1]])}
    both = ("input_ids", "token_type_ids")
    assert key_of(second, both) != key_of({**second, "token_type_ids": torch.zeros(1, 4).long()}, both)


def test_the_lengths_of_choices_change_keys() -> None:
    """The same five tokens split 2 + 3 and 3 + 2."""
    tokens = torch.tensor([[[1, 2, 0], [3, 4, 5]], [[1, 2, 3], [4, 5, 0]]])
    keys = key_of({"input_ids": tokens, "attention_mask": (tokens > 0).long()})
    assert keys[0] != keys[1]


def test_floats_are_hashed_by_their_bits() -> None:
    sound = torch.randn(1, 50)
    changed = sound.clone()
    changed[0, 17] = torch.nextafter(changed[0, 17], torch.tensor(9.0))
    columns = ("input_values",)
    assert key_of({"input_values": sound}, columns) != key_of({"input_values": changed}, columns)


def test_keys_use_the_teachers_columns() -> None:
    own = {"teacher_input_ids": torch.tensor([[3, 4]]), "teacher_cached_logits": torch.zeros(1, 3)}
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), **own}
    assert key_of(batch) == key_of({"input_ids": torch.tensor([[3, 4]])})
    assert key_columns(batch, main="input_ids", inputs=("input_ids", "attention_mask"), decodes=False) == ("input_ids",)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(
        DataError, match=r"identifies an example by input_ids, token_type_ids, and the batch has no token_ty"
    ):
        content_keys({"input_ids": torch.ones(1, 2)}, ("input_ids", "token_type_ids"), main="input_ids")


def test_decoder_keys_exclude_trailing_ignored_labels() -> None:
    """A label of -100 inside counts; those at the end are padding."""
    batch = {"input_ids": torch.ones(2, 2).long(), "labels": torch.tensor([[5, -100, 6, -100], [5, 6, -100, -100]])}
    shorter = {**batch, "labels": batch["labels"][:, :3]}
    columns = ("input_ids", "labels")
    assert key_of(batch, columns) == key_of(shorter, columns)
    assert not np.array_equal(key_of(batch, columns)[0], key_of(batch, columns)[1])
