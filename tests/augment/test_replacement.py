"""Word replacement: how often, by which words, and what stays. Counts lie within five binomial standard deviations."""

from __future__ import annotations

from collections import Counter
from math import sqrt

import numpy as np
import pytest
import torch

from hf_distill.augment import WordReplacement
from hf_distill.augment.words import Blank, LikelyWords, Neighbours, Words
from hf_distill.errors import DataError, SettingError
from tests.augment.making import masked_lm, whole_words, word_pieces

WORDS = 23


def ids(*tokens: str) -> list[int]:
    return word_pieces().convert_tokens_to_ids(list(tokens))


def close(count: int, of: int, probability: float) -> bool:
    return abs(count - of * probability) <= 5 * sqrt(of * probability * (1 - probability))


def likely_by_hand(model, sentence: list[int], position: int, count: int, allowed: set[int], mask: int) -> list[int]:
    """Return the likeliest words from one unpadded forward, sorted in plain Python."""
    blanked = [mask if i == position else token for i, token in enumerate(sentence)]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([blanked])).logits[0, position].tolist()
    return sorted(allowed, key=lambda token: -scores[token])[:count]


def test_batched_blanks_give_the_same_likely_words() -> None:
    tokenizer, model = whole_words(), masked_lm(WORDS + 2)  # an embedding padded by two rows
    with torch.no_grad():  # make non-words the likeliest: padding, the mask, a padded row
        model.cls.predictions.decoder.bias[[0, WORDS - 1, WORDS]] = 99.0
    sentences = [[3, 5, 7, 9, 2], [4, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    blanks = [Blank(sentence, i) for sentence in sentences for i in range(len(sentence))]
    found = LikelyWords(Words(tokenizer), model, count=4, batch_size=5)(blanks)
    allowed = set(range(1, WORDS - 1))
    expected = [likely_by_hand(model, b.ids, b.position, 4, allowed, tokenizer.mask_token_id) for b in blanks]
    assert found == expected
    assert len({tuple(words) for words in found}) > 5  # they depend on sentence and position


def test_the_masked_lm_uses_segments_and_evaluation_mode() -> None:
    tokenizer, model = whole_words(), masked_lm(WORDS).train()
    likely = LikelyWords(Words(tokenizer), model, count=3, batch_size=5)
    sentence, segments = [3, 5, 7, 9], [0, 0, 1, 1]
    (found,) = likely([Blank(sentence, 2, segments)])
    blanked = torch.tensor([[3, 5, tokenizer.mask_token_id, 9]])
    with torch.no_grad():
        scores = model.eval()(input_ids=blanked, token_type_ids=torch.tensor([segments])).logits[0, 2, 1 : WORDS - 1]
    assert found == (scores.argsort(descending=True)[:3] + 1).tolist()
    assert found != likely([Blank(sentence, 2)])[0]


def test_the_k_likeliest_words_are_drawn_uniformly() -> None:
    tokenizer, model = whole_words(), masked_lm(WORDS)
    replace = WordReplacement(tokenizer, masked_lm=model, probability=0.4, candidates=5, batch_size=64)
    sentence, copies = [3, 5, 7, 9], 500
    made = replace([{"input_ids": sentence, "labels": 1} for _ in range(copies)])
    allowed = set(range(1, WORDS - 1))
    for i, token in enumerate(sentence):
        expected = likely_by_hand(model, sentence, i, 5, allowed, tokenizer.mask_token_id)
        counts = Counter(example["input_ids"][i] for example in made)
        assert set(counts) == {*expected, token}
        for word in expected:
            # chosen with probability 0.4, then one of five; other words stay
            assert close(counts[word], copies, 0.4 / 5 + (0.6 if word == token else 0))
    assert all(example["labels"] == 1 for example in made)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.4, 1.0])
def test_the_share_of_replaced_words_is_the_probability(probability: float) -> None:
    """Neighbours never include the word itself, so every chosen word changes."""
    replace = WordReplacement(whole_words(), embeddings=torch.randn(WORDS, 6), probability=probability, candidates=3)
    sentence = [1 + i % 21 for i in range(100)]
    made = replace([{"input_ids": sentence} for _ in range(30)])
    replaced = sum(a != b for example in made for a, b in zip(example["input_ids"], sentence, strict=True))
    assert close(replaced, 3000, probability)


def test_neighbours_by_hand() -> None:
    """Cosines in Python over the model's embedding table; padding, mask and the word itself are excluded."""
    table = torch.randn(WORDS + 3, 6, generator=torch.Generator().manual_seed(3))
    found = Neighbours(Words(whole_words()), torch.nn.Embedding.from_pretrained(table), 4)

    def cosine(a: int, b: int) -> float:
        x, y = table[a].double().numpy(), table[b].double().numpy()
        return float(x @ y / np.sqrt((x @ x) * (y @ y)))

    for word in (1, 9, 21):
        expected = sorted(set(range(1, WORDS - 1)) - {word}, key=lambda other: -cosine(word, other))[:4]
        assert found([word]) == [(other,) for other in expected]
    assert len(Neighbours(Words(whole_words()), table, 100)([1])) == WORDS - 3  # all available words


def test_neighbours_use_a_copy_of_the_table() -> None:
    """Training changes the student's embeddings; the augmentation must not follow them."""
    table = torch.randn(WORDS, 6, generator=torch.Generator().manual_seed(3))
    before, live = Neighbours(Words(whole_words()), table.clone(), 4), Neighbours(Words(whole_words()), table, 4)
    table.copy_(torch.randn(WORDS, 6, generator=torch.Generator().manual_seed(4)))
    assert [live([word]) for word in range(1, 20)] == [before([word]) for word in range(1, 20)]


def test_a_word_of_several_pieces_has_their_mean_embedding() -> None:
    tokenizer = word_pieces()
    table = torch.zeros(len(tokenizer), 3)
    # playing = (play + ing) / 2 = (2, 1, 0): its cosine with fun (1, 0.5, 0) is 1, with sad (1, 1, 0) 3/√10 = 0.949,
    # with play (4, 0, 0) 2/√5 = 0.894. (A mean of unit vectors, (1, 1, 0) / 2, would put sad first.)
    for token, vector in {"play": [4, 0, 0], "##ing": [0, 2, 0], "fun": [1, 0.5, 0], "sad": [1, 1, 0]}.items():
        table[tokenizer.convert_tokens_to_ids(token)] = torch.tensor(vector, dtype=torch.float)
    found = Neighbours(Words(tokenizer), table, 3)(ids("play", "##ing"))
    assert found == [tuple(ids("fun")), tuple(ids("sad")), tuple(ids("play"))]


GLOVE = {"playing": [1.0, 0.1], "acting": [1.0, 0.2], "seeing": [1.0, 0.4], "fun": [0.9, 0.1], "rock&roll": [1.0, 0.1]}


def test_neighbours_in_a_word_table() -> None:
    """Nearest first; words that the tokenizer splits (rock & roll) are removed after counting."""
    nearest = Neighbours(Words(word_pieces()), {k: np.array(v) for k, v in GLOVE.items()}, 4)(ids("play", "##ing"))
    # By angle: rock&roll 5.7° and playing itself, fun 6.3°, acting 11.3°, seeing 21.8°.
    assert nearest == [tuple(ids("fun")), tuple(ids("act", "##ing")), tuple(ids("see", "##ing"))]
    assert Neighbours(Words(word_pieces()), GLOVE, 4)(ids("good")) == []  # not in the table


def test_the_table_is_used_only_for_words_of_several_pieces() -> None:
    tokenizer, model = word_pieces(), masked_lm(len(word_pieces()))
    replace = WordReplacement(tokenizer, masked_lm=model, embeddings=GLOVE, probability=1.0, candidates=1)
    sentence = ids("[CLS]", "good", "play", "##ing", ",", "film", "[SEP]")
    (made,) = replace([{"input_ids": sentence, "attention_mask": [1] * 7, "labels": 1}])
    allowed = set(Words(tokenizer).whole().nonzero().squeeze(-1).tolist())
    good, film = (likely_by_hand(model, sentence, i, 1, allowed, ids("[MASK]")[0]) for i in (1, 5))
    # The nearest word of the table is rock&roll, which cannot be written, so playing stays.
    assert made["input_ids"] == [*ids("[CLS]"), *good, *ids("play", "##ing", ","), *film, *ids("[SEP]")]
    assert WordReplacement(tokenizer, masked_lm=model, probability=1.0)([{"input_ids": ids("play", "##ing")}]) == [
        {"input_ids": ids("play", "##ing")}
    ]


def test_replacements_may_change_the_number_of_pieces() -> None:
    """Token columns grow and shrink with the words; other columns stay."""
    table = {"playing": [1.0, 0.0], "fun": [1.0, 0.1], "sad": [0.0, 1.0], "acting": [0.1, 1.0]}
    replace = WordReplacement(word_pieces(), embeddings=table, probability=1.0, candidates=1)
    assert (
        replace.moves_positions
        and not WordReplacement(word_pieces(), embeddings=table, same_length=True).moves_positions
    )
    example = {
        "input_ids": ids("[CLS]", "sad", "play", "##ing", "[SEP]"),
        "attention_mask": torch.ones(5, dtype=torch.long),
        "token_type_ids": np.array([0, 1, 2, 2, 3]),
        "labels": 2,
    }
    (made,) = replace([example])
    assert made["input_ids"] == ids("[CLS]", "act", "##ing", "fun", "[SEP]")
    assert made["attention_mask"].tolist() == [1] * 5 and made["attention_mask"].dtype == torch.long
    assert made["token_type_ids"].tolist() == [0, 1, 1, 2, 3]
    assert made["labels"] == 2
    assert example["input_ids"] == ids("[CLS]", "sad", "play", "##ing", "[SEP]")  # unchanged


def test_the_result_is_no_longer_than_the_models_limit() -> None:
    table = {"fun": [1.0, 0.0], "acting": [1.0, 0.1]}
    tokenizer = word_pieces()
    tokenizer.model_max_length = 3
    (made,) = WordReplacement(tokenizer, embeddings=table, probability=1.0)([{"input_ids": ids("fun", "fun")}])
    assert made["input_ids"] == ids("fun", "act", "##ing")


@pytest.mark.parametrize(
    "column",
    [
        {"labels": [0, 1, 1, -100, -100]},
        {"start_positions": 1, "end_positions": 3},
        {"attention_mask": [1, 1, 1, 1, 0]},
    ],
    ids=lambda column: next(iter(column)),
)
def test_token_labels_keep_their_positions(column) -> None:
    """Then the replacement needs as many pieces: playing becomes acting, although fun is nearer; sad stays."""
    table = {"playing": [1.0, 0.0], "fun": [1.0, 0.1], "acting": [1.0, 0.2], "sad": [-1.0, -0.2]}
    replace = WordReplacement(word_pieces(), embeddings=table, probability=1.0, candidates=3)
    example = {"input_ids": ids("fun", "play", "##ing", "[SEP]", "[PAD]"), **column}
    made = replace([example for _ in range(20)])
    assert {name: made[0][name] for name in column} == column
    assert {tuple(one["input_ids"][1:]) for one in made} == {tuple(ids("act", "##ing", "[SEP]", "[PAD]"))}
    assert {one["input_ids"][0] for one in made} == {*ids("sad")}


def test_padding_is_not_a_word_even_if_its_id_is() -> None:
    replace = WordReplacement(whole_words(), embeddings=torch.randn(WORDS, 6), probability=1.0)
    (made,) = replace([{"input_ids": [5, 6, 7, 7, 7], "attention_mask": [1, 1, 0, 0, 0]}])
    assert made["input_ids"][2:] == [7, 7, 7] and made["input_ids"][0] != 5 and made["input_ids"][1] != 6


def test_random_draws_do_not_depend_on_the_model() -> None:
    """The same words are chosen for any candidates: exactly two draws for each word."""
    example = {"input_ids": list(range(1, 20))}
    chosen = []
    for table in (torch.randn(WORDS, 4), torch.randn(WORDS, 4)):
        torch.manual_seed(7)
        (made,) = WordReplacement(whole_words(), embeddings=table, probability=0.5)([example])
        chosen.append([a != b for a, b in zip(made["input_ids"], example["input_ids"], strict=True)])
    assert chosen[0] == chosen[1] and 0 < sum(chosen[0]) < 19


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"needs masked_lm= or embeddings=, .*got neither"),
        ({"embeddings": torch.ones(WORDS, 2), "probability": 1.5}, r"probability=1\.5 \(0 to 1\)"),
        ({"embeddings": torch.ones(WORDS, 2), "candidates": 0}, r"candidates=0 .*1 or more"),
        ({"embeddings": torch.ones(WORDS - 1, 2)}, r"embeddings has 22 rows and the tokenizer 23 tokens"),
        ({"embeddings": "glove.txt"}, r"embeddings=str: it may be a mapping of words to vectors"),
        ({"masked_lm": masked_lm(WORDS - 1)}, r"masked_lm has 22 tokens, the tokenizer 23"),
    ],
)
def test_invalid_settings_raise(settings, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        WordReplacement(whole_words(), **settings)


def test_a_masked_lm_requires_a_mask_token() -> None:
    tokenizer = whole_words()
    tokenizer.mask_token = None
    with pytest.raises(SettingError, match="the tokenizer has no mask token"):
        WordReplacement(tokenizer, masked_lm=masked_lm(WORDS))


def test_invalid_examples_raise() -> None:
    replace = WordReplacement(whole_words(), embeddings=torch.ones(WORDS, 2))
    with pytest.raises(DataError, match=r"one sequence of input_ids, not \['text'\]. Tokenize"):
        replace([{"text": "w1 w2"}])
    with pytest.raises(DataError, match=r"several sequences an example \(multiple choice\)"):
        replace([{"input_ids": [[1, 2], [3, 4]]}])
