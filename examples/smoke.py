"""What `--smoke` puts in the Hub's place: tiny checkpoints and datasets made from nothing. They teach nothing."""

import atexit
import json
import math
import shutil
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

import datasets
import torch
import transformers as tf
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

# Defaults of the training options under --smoke: seconds on a CPU, nothing asked of the Hub.
SETTINGS = {
    **{"max_steps": 2, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "report_to": "none"},
    **{"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "disable_tqdm": True},
    **{"use_cpu": True, "bf16": False, "dataloader_num_workers": 0, "dataloader_pin_memory": False},
}
SENTENCES = ["a good film", "a dull and slow plot", "good acting", "slow", "a good plot and a good film", "dull acting"]
SmokeData = tuple[str, str, DatasetDict]  # the teacher's folder, the student's, and the data


def options(description: str, **defaults: object) -> Namespace:
    """The command line of a script without training arguments, from its defaults; and `--smoke`."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="Tiny models and data, offline, in seconds.")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"Default: {value}.")
    return parser.parse_args()


def glue() -> SmokeData:
    """BERT, DistilBERT without a head, and data like SST-2."""
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    rows = {"sentence": SENTENCES, "label": [int("good" in text) for text in SENTENCES]}
    berts = _berts(tf.BertForSequenceClassification, SENTENCES)
    return *berts, _splits(Dataset.from_dict(rows, features=features))


def ner() -> SmokeData:
    """BERT, its labels in another order than the data's, DistilBERT without a head, and data like CoNLL-2003."""
    texts = ["ada byron lived in london", "london is big", "ada left", "byron in london"]
    rows = {"tokens": [text.split() for text in texts], "ner_tags": [[1, 2, 0, 0, 3], [3, 0, 0], [1, 0], [1, 0, 3]]}
    tag = List(ClassLabel(names=["O", "B-PER", "I-PER", "B-LOC"]))
    features = Features({"tokens": List(Value("string")), "ner_tags": tag})
    berts = _berts(tf.BertForTokenClassification, texts, labels=["O", "B-LOC", "B-PER", "I-PER"])
    return *berts, _splits(Dataset.from_dict(rows, features=features))


def squad() -> SmokeData:
    """BERT, DistilBERT without a head, and data like SQuAD; one context is longer than a window."""
    rows = {
        "id": ["0", "1"],
        "context": ["ada lived in london and wrote", "the plot is slow and the film is good " * 12],
        "question": ["where did ada live", "how is the plot"],
        "answers": [{"text": ["london"], "answer_start": [13]}, {"text": ["slow"], "answer_start": [12]}],
    }
    return *_berts(tf.BertForQuestionAnswering, rows["context"] + rows["question"]), _splits(Dataset.from_dict(rows))


def text() -> SmokeData:
    """Two GPT-2 and data like WikiText."""
    tokenizer = tf.GPT2Tokenizer(vocab=_bytes(), merges=[])
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    configs = [tf.GPT2Config(vocab_size=257, n_embd=16, n_layer=n, n_head=2, n_positions=64, **ends) for n in (2, 1)]
    data = Dataset.from_dict({"text": [f"{line}\n" for line in SENTENCES * 4]})
    return *(_save(_made(tf.GPT2LMHeadModel, config), tokenizer) for config in configs), _splits(data)


def whisper() -> SmokeData:
    """Two Whispers and data like LibriSpeech, of tones."""
    names = ("startoftranscript", "en", "de", "transcribe", "translate", "notimestamps")
    start, *tasks = (f"<|{name}|>" for name in names)
    tokenizer = tf.WhisperTokenizer(vocab=_bytes(), merges=[], pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [start, *tasks]})
    english, german, transcribe, translate, notimestamps = tokenizer.convert_tokens_to_ids(tasks)
    processor = tf.WhisperProcessor(tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer)
    sizes = {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("attention_heads", "layers")}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8}
    ids = {"pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256, "decoder_start_token_id": 257}
    config = tf.WhisperConfig(
        vocab_size=len(tokenizer), max_source_positions=50, max_target_positions=48, begin_suppress_tokens=None,
        **sizes, **ids,
    )  # fmt: skip
    # As published, and not made from the config: what is made from it comes back from the disk without these names.
    published = tf.GenerationConfig(
        is_multilingual=True, lang_to_id={"<|en|>": english, "<|de|>": german}, no_timestamps_token_id=notimestamps,
        task_to_id={"transcribe": transcribe, "translate": translate}, **ids,
    )  # fmt: skip
    models = []
    for layers in (2, 1):
        config.update({"encoder_layers": layers, "decoder_layers": layers})
        models.append(_made(tf.WhisperForConditionalGeneration, config))
        models[-1].generation_config = published
    return *(_save(model, processor) for model in models), _speech()


def wav2vec2() -> tuple[str, DatasetDict]:
    """A Wav2Vec2, from whose layers the student is made, and data like LibriSpeech, of tones."""
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    (vocabulary := _folder() / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    extractor = tf.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    processor = tf.Wav2Vec2Processor(extractor, tf.Wav2Vec2CTCTokenizer(str(vocabulary)))
    config = tf.Wav2Vec2Config(
        vocab_size=len(letters), hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        conv_dim=(8, 8), conv_kernel=(10, 8), conv_stride=(160, 2), feat_extract_norm="layer", apply_spec_augment=False,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True, pad_token_id=0,
    )  # fmt: skip
    model = _made(tf.Wav2Vec2ForCTC, config)
    del model.wav2vec2.masked_spec_embed  # the published checkpoints lack it, too
    return _save(model, processor), _speech()


def audio_classifier() -> tuple[str, DatasetDict]:
    """A Wav2Vec2 classifier, from whose layers the student is made, and tones with the names of their pitch."""
    names = {"low": 0, "high": 1}
    config = tf.Wav2Vec2Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5,
        conv_dim=(8, 8), conv_kernel=(10, 8), conv_stride=(160, 2), num_conv_pos_embeddings=4, apply_spec_augment=False,
        num_conv_pos_embedding_groups=2, classifier_proj_size=8, label2id=names, id2label=dict(enumerate(names)),
    )  # fmt: skip
    model = _made(tf.Wav2Vec2ForSequenceClassification, config)
    return _save(model, tf.Wav2Vec2FeatureExtractor()), _speech(label=["low", "low", "high", "high"])


def image_classifier() -> tuple[str, DatasetDict]:
    """A ViT, from whose layers the student is made, and images of one colour with its name."""
    names = ["blue", "red"]
    config = tf.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        label2id={name: i for i, name in enumerate(names)}, id2label=dict(enumerate(names)),
    )  # fmt: skip
    colours = [(200 - 10 * i, 20, 20) if i % 2 else (20, 20, 200 - 10 * i) for i in range(6)]
    rows = {"image": [Image.new("RGB", (40, 30), colour) for colour in colours], "label": [i % 2 for i in range(6)]}
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=names)})
    processor = tf.ViTImageProcessorPil(size={"height": 32, "width": 32})
    return _save(_made(tf.ViTForImageClassification, config), processor), _splits(Dataset.from_dict(rows, features))


def _speech(**columns: list[str]) -> DatasetDict:
    sounds = [[math.sin(0.01 * pitch * t) for t in range(6000 + 1000 * pitch)] for pitch in range(1, 5)]
    rows = {
        "audio": [{"array": sound, "sampling_rate": 16_000} for sound in sounds],
        "text": ["A", "GOOD", "DOG", "AGO"],
        **columns,
    }
    return _splits(Dataset.from_dict(rows))


def _berts(kind: type, texts: list[str], labels: list[str] | None = None) -> tuple[str, str]:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in texts for word in text.split()})]
    vocabulary = {word: i for i, word in enumerate(words)}
    common = {"vocab_size": len(words), "initializer_range": 0.2}
    teacher = tf.BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, **common)
    if labels is not None:
        teacher.id2label, teacher.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    steady = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    student = tf.DistilBertConfig(dim=16, hidden_dim=16, n_layers=1, n_heads=2, **steady, **common)
    path = _save(_made(kind, teacher), tf.BertTokenizer(vocab=vocabulary))
    return path, _save(_made(tf.DistilBertModel, student), tf.DistilBertTokenizer(vocab=vocabulary))


def _made(kind: type, config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    torch.manual_seed(0)  # the same on every process
    return kind(config)


def _bytes() -> dict[str, int]:
    """The letters of a byte-level vocabulary as far as these texts need them."""
    return {**{chr(i) if 33 <= i < 127 else chr(256 + i): i for i in range(256)}, "<|endoftext|>": 256}


def _splits(data: Dataset) -> DatasetDict:
    return DatasetDict({"train": data, "validation": data})


def _save(model: tf.PreTrainedModel, processor: object) -> str:
    path = _folder()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def _folder() -> Path:
    """A folder that goes when the process does."""
    path = Path(tempfile.mkdtemp(prefix="hf-distill-smoke-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
