"""Trimmed vocabularies: the corpus is encoded to the same tokens, and the narrowed model predicts the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.testing import assert_close

from hf_distill.errors import DataError, SettingError, TeacherError
from hf_distill.students import inherit, trim_vocabulary
from hf_distill.students.narrow.narrow import narrow
from tests.students.models import MODELS, one_an_architecture, reported
from tests.tiny_tokenizers import bpe_tokenizer, tokenizer

PLAIN = [
    "the cat sat on the mat", "a dog chased the cat over the hill", "reading and writing and walking home",
    "she walked, he talked; they were talking", "nothing unusual happened yesterday évening",
    "running runners run", "Zürich ßtraße naïve", "numbers 1234 and 98765", "unhappiness undone", "quick brown foxes",
]  # fmt: skip
CORPUS = PLAIN[:5] * 2  # a part of the texts that the tokenizers were trained on
NAMES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROLES = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def word_piece() -> Any:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(PLAIN, trainers.WordPieceTrainer(vocab_size=160, special_tokens=NAMES))
    vocabulary = backend.get_vocab()
    return hf.BertTokenizerFast(vocab=vocabulary, do_lower_case=False, strip_accents=False)


def byte_bpe(merges: int = 120) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, special_tokens=["<|end|>", "<pad>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(PLAIN, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", pair="$A <|end|> $B:1 <|end|>:1", special_tokens=[("<|end|>", 0)]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<pad>")


def gpt2() -> Any:
    trained = byte_bpe().backend_tokenizer
    model = json.loads(trained.to_str())["model"]
    return hf.GPT2TokenizerFast(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], unk_token="<|end|>",
        bos_token="<|end|>", eos_token="<|end|>", pad_token="<pad>",
    )  # fmt: skip


def fallback_bpe() -> Any:
    """Like Llama's: spaces are marked, and unknown characters are encoded as bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="[UNK]", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*NAMES, *data])
    backend.train_from_iterator(PLAIN[:9], trainer)
    loaded = json.loads(backend.to_str())
    loaded["added_tokens"] = [one for one in loaded["added_tokens"] if not one["content"].startswith("<0x")]
    return hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(loaded)), **ROLES)


def suffix_bpe() -> Any:
    """Like CLIP's: the last piece of a word is marked."""
    backend = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=NAMES, end_of_word_suffix="</w>")
    backend.train_from_iterator(PLAIN, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES)


def unigram() -> Any:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=130, special_tokens=NAMES, unk_token="[UNK]", show_progress=False)
    backend.train_from_iterator(PLAIN, trainer)
    made = hf.PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES)
    made.add_tokens(["<extra>"])
    return made


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "WordPiece": word_piece, "BPE": byte_bpe, "GPT-2": gpt2, "BPE with bytes": fallback_bpe, "BPE, suffix": suffix_bpe,
    "Unigram": unigram, "words": lambda: tokenizer({word: i for i, word in enumerate(" ".join(PLAIN).split())}),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_corpus_is_encoded_to_the_same_tokens(kind: str, tmp_path: Path) -> None:
    before = TOKENIZERS[kind]()
    vocabulary = trim_vocabulary(before, iter(CORPUS))
    after = vocabulary.tokenizer
    after.save_pretrained(tmp_path)
    again = type(before).from_pretrained(tmp_path)
    assert len(vocabulary.kept) < len(before.get_vocab()) and list(vocabulary.kept) == sorted(set(vocabulary.kept))
    for text in [*CORPUS, "the the cat", CORPUS[0] + " " + CORPUS[3]]:
        tokens = before.convert_ids_to_tokens(before(text)["input_ids"])
        for made in (after, again):
            ids = made(text)["input_ids"]
            assert made.convert_ids_to_tokens(ids) == tokens
            assert [vocabulary.kept[index] for index in ids] == before(text)["input_ids"]
            assert made.decode(ids) == before.decode(before(text)["input_ids"])
    assert sorted(after.get_vocab().values()) == list(range(len(vocabulary.kept)))
    for role in ("pad", "eos", "cls", "sep", "unk", "mask"):
        assert getattr(after, f"{role}_token") == getattr(before, f"{role}_token")
    assert f"{len(vocabulary.kept)} of {len(before.get_vocab())} tokens" == str(vocabulary)


@pytest.mark.parametrize("kind", ["BPE", "GPT-2", "BPE with bytes"])
def test_tokenizers_with_bytes_still_encode_everything(kind: str) -> None:
    after = trim_vocabulary(TOKENIZERS[kind](), CORPUS).tokenizer
    text = "xylophon 漢字 Ω"
    ids = after(text, add_special_tokens=False)["input_ids"]
    assert after.unk_token_id is None or kind == "GPT-2" or after.unk_token_id not in ids
    assert kind == "BPE with bytes" or after.decode(ids) == text


def test_only_merges_behind_kept_tokens_are_kept() -> None:
    """Of the merges a·b, b·c and ab·c the text "abc" uses the first and the last; "bc" never occurs."""
    before = bpe_tokenizer([("a", "b"), ("b", "c"), ("ab", "c")])
    vocabulary = trim_vocabulary(before, ["abc"])
    assert vocabulary.tokenizer.convert_ids_to_tokens(range(len(vocabulary.kept))) == ["a", "b", "c", "ab", "abc"]
    assert vocabulary.tokenizer.tokenize("abcbc") == ["abc", "b", "c"] and before.tokenize("abcbc") == ["abc", "bc"]


def test_further_ids_can_be_kept() -> None:
    assert trim_vocabulary(tokenizer(), ["w3"], keep=[7]).kept == (0, 3, 7)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((object(), ["a"]), SettingError, "object is not a fast tokenizer"),
        ((tokenizer(), "w1 w2"), SettingError, "texts= is one string"),
        ((tokenizer(), []), DataError, "texts= is empty"),
        ((tokenizer(), ["w1", 3]), DataError, "texts= contains a int"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trim_vocabulary(*arguments)
    with pytest.raises(SettingError, match=r"keep= has ids that are not in the tokenizer: \[99\]"):
        trim_vocabulary(tokenizer(), ["w1"], keep=[99])


TEXTS = ["w3 w4 w5 w6 w7 w2", "w9 w10 w11 w2 w0 w0", "w1 w5 w6 w8"]
WITH_TOKENS = [
    name for name, tiny in MODELS.items()
    if (tiny.modality in ("text", "choices") or "Whisper" in name or "CTC" in name)
    and name != "WhisperForAudioClassification"
]  # fmt: skip


@pytest.mark.parametrize("name", one_an_architecture(WITH_TOKENS))
def test_predictions_of_kept_tokens_are_the_teachers(name: str, tmp_path: Path) -> None:
    """For the same text, each with its own tokenizer, both models predict the same for every kept token."""
    tiny = MODELS[name]
    teacher = tiny.make(layers=4 if name.startswith("Longformer") else 1)
    vocabulary = trim_vocabulary(tokenizer(), TEXTS)
    assert vocabulary.kept == tuple(range(12))
    vocabulary = trim_vocabulary(tokenizer(), TEXTS, keep=[30])
    kept = torch.tensor(vocabulary.kept)
    student = narrow(teacher, vocabulary=vocabulary)
    assert student.config.vocab_size == 13
    batch = dict(tiny.batch())
    with torch.no_grad():
        theirs = teacher(**batch)
        renumbered = {key: torch.searchsorted(kept, x) if key.endswith("input_ids") else x for key, x in batch.items()}
        ours = student(**renumbered)
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            expected = theirs[key]
            assert_close(value, expected[..., kept] if expected.shape[-1] == 40 else expected, rtol=1e-5, atol=1e-6)
    student.save_pretrained(tmp_path)
    again, loading = tiny.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    with torch.no_grad():
        assert_close(again.eval()(**renumbered)[0], ours[0])
    for one, two in tied_pairs(teacher):
        assert student.get_parameter(one) is student.get_parameter(two)


def tied_pairs(model: Any) -> list[tuple[str, str]]:
    """Return pairs of names of the same parameter."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return [(first[id(x)], name) for name, x in named if first.setdefault(id(x), name) != name]


def test_ids_in_the_configs_are_renumbered() -> None:
    teacher = MODELS["BartForConditionalGeneration"].make(layers=1, decoder_start_token_id=20, eos_token_id=30)
    teacher.generation_config.suppress_tokens = [5, 30, 33]
    teacher.generation_config.forced_eos_token_id = 30
    teacher.generation_config.bad_words_ids = [[5, 20], [5, 33]]
    vocabulary = trim_vocabulary(tokenizer(), ["w5 w20", "w30"], keep=[1])
    student, report = reported(narrow(teacher, vocabulary=vocabulary))
    assert vocabulary.kept == (0, 1, 5, 20, 30)
    config, generation = student.config, student.generation_config
    assert (config.pad_token_id, config.bos_token_id, config.decoder_start_token_id, config.eos_token_id) == (
        0,
        1,
        3,
        4,
    )
    assert (generation.eos_token_id, generation.decoder_start_token_id, generation.forced_eos_token_id) == (4, 3, 4)
    assert generation.suppress_tokens == [2, 4] and generation.bad_words_ids == [[2, 3]]
    assert any("suppress_tokens: 2 of 3" in note for note in report.notes)
    assert teacher.generation_config.suppress_tokens == [5, 30, 33] and teacher.config.eos_token_id == 30
    with pytest.raises(TeacherError, match=r"eos_token_id=30 is not kept. Pass it to .*keep=\[30\]"):
        narrow(teacher, vocabulary=trim_vocabulary(tokenizer(), ["w5 w20"], keep=[1]))


def test_the_tokenizer_of_another_model_is_an_error() -> None:
    teacher = MODELS["BertForMaskedLM"].make(layers=1)
    with pytest.raises(TeacherError, match=r"ids up to 50, but the teacher has 40 tokens. Is it the teacher's"):
        narrow(teacher, vocabulary=trim_vocabulary(tokenizer(60), ["w50"]))
    with pytest.raises(SettingError, match=r"vocabulary= is a list. Pass students.trim_vocabulary"):
        narrow(teacher, vocabulary=[1, 2])  # type: ignore[arg-type]  # the mistake under test


def test_all_cuts_together() -> None:
    tiny = MODELS["BertForMaskedLM"]
    teacher = tiny.make(layers=3)
    vocabulary = trim_vocabulary(tokenizer(), TEXTS)
    arguments: dict[str, Any] = {"hidden": 8, "heads": 1, "intermediate": 4, "data": [tiny.batch()]}
    student, report = reported(narrow(inherit(teacher, layers=2), vocabulary=vocabulary, **arguments))
    assert student.get_input_embeddings().weight.shape == (12, 8) and report.kept["tokens"] == tuple(range(12))
    assert torch.equal(
        student.get_input_embeddings().weight,
        teacher.get_input_embeddings().weight[:12][:, list(report.kept["hidden states"])],
    )
    assert str(report).startswith("BertForMaskedLM: ") and "config.vocab_size: 12 of 40" in str(report)
