"""The paragraphs: the same every time, none twice, none in two splits, each with its package."""

import pytest

from hf_distill.cli.stdlib_corpus import _words, read_stdlib_corpus, split_of
from hf_distill.errors import DataError


def everything(corpus):
    return [*corpus.train, *corpus.validation, *corpus.test]


@pytest.fixture(scope="module")
def real():
    """This Python's own standard library."""
    return read_stdlib_corpus()


def test_the_real_library_has_thousands_of_paragraphs(real):
    assert len(real.packages) == 16 and list(real.packages) == sorted(real.packages)
    assert len(everything(real)) > 3000
    assert {paragraph.label for paragraph in real.train} == set(range(16))
    assert "test" not in real.packages


def test_no_paragraph_is_there_twice_nor_in_two_splits(real):
    words = [_words(paragraph.text) for paragraph in everything(real)]
    assert len(set(words)) == len(words)
    for part in ("train", "validation", "test"):
        assert all(split_of(_words(p.text)) == part for p in getattr(real, part))


def test_shares_of_the_splits(real):
    total = len(everything(real))
    assert 0.72 < len(real.train) / total < 0.78
    assert 0.08 < len(real.validation) / total < 0.12


def test_labels_are_the_packages(library):
    corpus = read_stdlib_corpus(root=library, packages=6)
    assert corpus.packages == ("archive", "colour", "fraction", "mailbox", "socket", "thread")
    assert len(everything(corpus)) == 6 * 60
    assert all(corpus.packages[p.label] in p.text for p in everything(corpus))


def test_a_paragraph_of_two_packages_has_no_label_and_is_left_out(library):
    shared = '"""Exactly these words, stand in TWO packages of ours."""'
    (library / "socket" / "more.py").write_text(shared)
    (library / "colour" / "more.py").write_text(shared.lower().replace(",", ""))
    texts = [p.text for p in everything(read_stdlib_corpus(root=library, packages=6))]
    assert len(texts) == 6 * 60 and not any("two packages" in text.lower() for text in texts)


def test_a_repeated_paragraph_is_kept_once(library):
    twice = '"""One helper of many for the sockets of the world."""'
    (library / "socket" / "one.py").write_text(twice)
    (library / "socket" / "two.py").write_text(twice)
    assert len(everything(read_stdlib_corpus(root=library, packages=6))) == 6 * 60 + 1


def test_a_docstring_splits_at_blank_lines_and_short_ones_go(library):
    (library / "socket" / "one.py").write_text(
        '"""First: a sentence about sockets\nthat goes on.\n\nToo short.\n\n'
        'Second: another sentence about the sockets.\n"""'
    )
    texts = [p.text for p in everything(read_stdlib_corpus(root=library, packages=6))]
    assert "First: a sentence about sockets that goes on." in texts
    assert "Second: another sentence about the sockets." in texts
    assert "Too short." not in texts


def test_the_largest_packages_are_taken(library):
    (library / "tiny.py").write_text('"""A tiny module with a single paragraph about nothing."""')
    assert "tiny" not in read_stdlib_corpus(root=library, packages=6).packages
    assert "tiny" in read_stdlib_corpus(root=library, packages=7).packages


def test_too_few_packages_is_an_error_that_says_what_to_do(library):
    with pytest.raises(DataError, match=r"6 packages found, 16 are needed\. Use a Python whose"):
        read_stdlib_corpus(root=library)
