"""The parts of the quickstart: tokenizer, models, hidden labels, the results folder, the sentence on the gain."""

import json
import os

import pytest
import torch

from hf_distill.cli.quickstart import MARK, fill_folder
from hf_distill.cli.quickstart_report import gain_sentence
from hf_distill.cli.quickstart_training import (
    UNLABELLED,
    batches,
    choose_labelled,
    hide_labels,
    make_classifier,
    make_tokenizer,
    tokenize,
)
from hf_distill.cli.stdlib_corpus import Paragraph, read_stdlib_corpus
from hf_distill.errors import SettingError
from tests.distributed.launch import alone

TEXTS = [f"Return the {word} number {n}." for word in ("socket", "colour") for n in range(20)]


@pytest.fixture
def tokenizer():
    return make_tokenizer(TEXTS, vocabulary_size=120, max_tokens=8)


READ_AGAIN = """
import json, pathlib, sys
from hf_distill.cli.quickstart_training import make_tokenizer
from hf_distill.cli.stdlib_corpus import read_stdlib_corpus
train = read_stdlib_corpus(root=pathlib.Path(sys.argv[1]), packages=6).train
texts = [paragraph.text for paragraph in train]
made = make_tokenizer(texts, vocabulary_size=120, max_tokens=8)
print(json.dumps([texts, made.get_vocab(), hash("a word")]))
"""


def test_another_process_makes_the_same_paragraphs_and_tokenizer(library, tmp_path):
    (tmp_path / "again.py").write_text(READ_AGAIN)
    *found, hashed = json.loads(alone(tmp_path / "again.py", str(library)))
    texts = [paragraph.text for paragraph in read_stdlib_corpus(root=library, packages=6).train]
    assert found == [texts, make_tokenizer(texts, vocabulary_size=120, max_tokens=8).get_vocab()]
    assert hashed != hash("a word") or "PYTHONHASHSEED" in os.environ  # so sets of words have another order there


def test_paragraphs_are_cut_and_start_with_cls(tokenizer):
    ids = tokenizer("Return the socket number 1. " * 9, truncation=True)["input_ids"]
    assert len(ids) == 8
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id


def test_a_seed_determines_the_weights_and_keeps_the_random_state(tokenizer):
    size = {"layers": 1, "width": 16}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = make_classifier(tokenizer, ["a", "b"], seed=1, **size)
    assert torch.equal(torch.rand(3), expected)
    again, other = (make_classifier(tokenizer, ["a", "b"], seed=s, **size) for s in (1, 2))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert first.config.label2id == {"a": 0, "b": 1}


def test_the_labelled_share_is_taken_from_every_class():
    labels = [0] * 100 + [1] * 30 + [2]
    chosen = choose_labelled(labels, share=0.1, seed=0)
    assert [sum(labels[i] == c for i in chosen) for c in (0, 1, 2)] == [10, 3, 1]
    assert chosen == choose_labelled(labels, share=0.1, seed=0)
    assert chosen != choose_labelled(labels, share=0.1, seed=1)


def test_hidden_labels_change_nothing_else(tokenizer):
    paragraphs = [Paragraph(text=text, label=i % 2) for i, text in enumerate(TEXTS)]
    whole = tokenize(paragraphs, tokenizer)
    hidden = hide_labels(whole, labelled=[1, 3])
    assert hidden["input_ids"] == whole["input_ids"]
    assert [i for i, label in enumerate(hidden["labels"]) if label != UNLABELLED] == [1, 3]
    assert hidden["labels"][1] == whole["labels"][1] == 1


def test_batches_keep_the_order_and_hold_no_label(tokenizer):
    paragraphs = [Paragraph(text=text, label=0) for text in TEXTS]
    dataset = tokenize(paragraphs, tokenizer)
    found = list(batches(dataset, tokenizer, batch_size=16, device="cpu"))
    assert [len(batch["input_ids"]) for batch in found] == [16, 16, 8]
    assert all(set(batch) == {"input_ids", "attention_mask"} for batch in found)
    first = found[1]["input_ids"][0]
    assert first[first != tokenizer.pad_token_id].tolist() == dataset[16]["input_ids"]


def test_the_sentence_says_if_there_was_no_gain():
    assert "NOT more than the spread" in gain_sentence([0.5, 0.6, 0.5], [0.5, 0.61, 0.52])
    assert "NOT more" in gain_sentence([0.5, 0.51], [0.4, 0.41])
    assert "NOT" not in gain_sentence([0.50, 0.51, 0.52], [0.70, 0.71, 0.70])
    assert "one seed has no spread to compare with" in gain_sentence([0.5], [0.7])


def fill(folder, text="new"):
    with fill_folder(folder, entries=["a.txt", "models"]) as work:
        (work / "a.txt").write_text(text)
        (work / "models").mkdir()
        (work / "models" / "b.txt").write_text(text)


def test_a_folder_is_filled_and_filled_again(tmp_path):
    fill(tmp_path / "deep" / "out")
    fill(tmp_path / "deep" / "out", "newer")
    out = tmp_path / "deep" / "out"
    assert {path.name for path in out.iterdir()} == {MARK, "a.txt", "models"}
    assert (out / "models" / "b.txt").read_text() == (out / "a.txt").read_text() == "newer"


def test_a_failed_run_leaves_nothing_behind(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), fill_folder(out, entries=["a.txt"]) as work:
        (work / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert not out.exists()


def test_a_failed_run_keeps_the_earlier_results(tmp_path):
    fill(tmp_path / "out")
    with pytest.raises(RuntimeError), fill_folder(tmp_path / "out", entries=["a.txt", "models"]):
        raise RuntimeError
    assert (tmp_path / "out" / "a.txt").read_text() == "new"
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SettingError, match=r"the quickstart did not make \(thesis.tex\)"):
        fill(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_that_was_added_to_a_results_folder(tmp_path):
    fill(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SettingError, match=r"notes\.txt"):
        fill(tmp_path)


def test_the_next_run_removes_the_files_of_a_killed_run(tmp_path):
    (tmp_path / ".unfinished-abc").mkdir()
    fill(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {MARK, "a.txt", "models"}


def test_a_file_instead_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SettingError, match=r"is a file\. Give a folder"):
        fill(tmp_path / "out")
