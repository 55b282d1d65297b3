"""How to load and call a student: its Auto class, its pipeline tag, and a program."""

from __future__ import annotations

from typing import NamedTuple

from hf_distill.hub.facts import CardData


class Use(NamedTuple):
    """How a kind of student is used.

    Attributes:
        tag: the pipeline tag of the Hub.
        title: the tag in words.
        auto: the Auto class that loads it.
        processor: a part of the names of processing classes that make this program's inputs.
        program: Python code, with {model} for where to load from and {auto} for the Auto class.
    """

    tag: str
    title: str
    auto: str
    processor: str
    program: str


COUNTS_LABELS = ("classification", "regression", "token_classification")

_PIPELINE = """from transformers import pipeline

run = pipeline("{tag}", model="{model}")
print(run("Put your own text here."))"""

_FILL = """from transformers import pipeline

run = pipeline("{tag}", model="{model}")
print(run(f"Put your own {{run.tokenizer.mask_token}} here."))"""

_GENERATE = """from transformers import pipeline

run = pipeline("{tag}", model="{model}")
print(run("Put your own text here.", max_new_tokens=20))"""

_AUDIO = """import numpy as np
from transformers import pipeline

run = pipeline("{tag}", model="{model}")
rate = run.feature_extractor.sampling_rate
audio = np.zeros(rate, dtype=np.float32)  # one second of silence: put your own here
print(run({{"raw": audio, "sampling_rate": rate}}))"""

_IMAGE = """from PIL import Image
from transformers import pipeline

run = pipeline("{tag}", model="{model}")
print(run(Image.new("RGB", (224, 224))))  # put your own picture here"""

_CHOICE = """import torch
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
{load}
question, choices = "Put your question here.", ["one answer", "another answer"]
batch = tokenizer([question] * len(choices), choices, padding=True, return_tensors="pt")
with torch.no_grad():
    scores = model(**{{name: x.unsqueeze(0) for name, x in batch.items()}}).logits[0]
print(choices[scores.argmax()])"""

_SPAN = """import torch
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
{load}
batch = tokenizer("Put your question here.", "Put your text here.", return_tensors="pt")
with torch.no_grad():
    output = model(**batch)
start, end = output.start_logits.argmax(), output.end_logits.argmax()
print(tokenizer.decode(batch["input_ids"][0][start : end + 1]))"""

_SEQ2SEQ = """from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
{load}
batch = tokenizer("Put your own text here.", return_tensors="pt")
output = model.generate(**batch, max_new_tokens=50)
print(tokenizer.batch_decode(output, skip_special_tokens=True))"""

_FORWARD = """import torch
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
{load}
with torch.no_grad():
    output = model(**tokenizer("Put your own text here.", return_tensors="pt"))
print({{name: tuple(x.shape) for name, x in output.items() if hasattr(x, "shape")}})"""

_EMBED = """import torch
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
{load}
batch = tokenizer(["Put your own texts here.", "And another."], padding=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
mask = batch["attention_mask"].bool()
embeddings = {pooled}  # as in training
print(embeddings.shape)"""

POOLED = {
    "mean": "the mean of its last hidden states over the attended positions",
    "first": "its last hidden state at the first attended position",
    "last": "its last hidden state at the last attended position",
}
_POOLING = {
    "mean": "hidden.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)",
    "first": "hidden[torch.arange(len(hidden)), mask.int().argmax(1)]",
    "last": "hidden[torch.arange(len(hidden)), mask.shape[1] - 1 - mask.int().flip(1).argmax(1)]",
}

_LOAD_ONLY = """from transformers import {auto}

{load}
print(model.config)"""

_LOAD = 'model = {auto}.from_pretrained("{model}")'
_LOAD_ADAPTER = """base = {auto}.from_pretrained("{base}"{labels})
model = PeftModel.from_pretrained(base, "{model}")"""

_TEXT_CLASSES = Use(
    *("text-classification", "Text Classification", "AutoModelForSequenceClassification", "Token", _PIPELINE)
)
_TOKEN_CLASSES = "AutoModelForTokenClassification"
_TEXT = {
    "classification": _TEXT_CLASSES,
    "regression": _TEXT_CLASSES,
    "multiple_choice": Use("multiple-choice", "Multiple Choice", "AutoModelForMultipleChoice", "Token", _CHOICE),
    "token_classification": Use("token-classification", "Token Classification", _TOKEN_CLASSES, "Token", _PIPELINE),
    "span": Use("question-answering", "Question Answering", "AutoModelForQuestionAnswering", "Token", _SPAN),
    "masked_lm": Use("fill-mask", "Masked Language Modeling", "AutoModelForMaskedLM", "Token", _FILL),
    "causal_lm": Use("text-generation", "Causal Language Modeling", "AutoModelForCausalLM", "Token", _GENERATE),
    "seq2seq": Use(
        *("text2text-generation", "Sequence-to-sequence Language Modeling", "AutoModelForSeq2SeqLM", "Token", _SEQ2SEQ)
    ),
    "embedding": Use("feature-extraction", "Feature Extraction", "AutoModel", "Token", _FORWARD),
}
_AUDIO_CLASSES = Use(
    *("audio-classification", "Audio Classification", "AutoModelForAudioClassification", "FeatureExtractor", _AUDIO)
)
_SPEECH = ("automatic-speech-recognition", "Automatic Speech Recognition")
_SOUND = {
    "classification": _AUDIO_CLASSES,
    "regression": _AUDIO_CLASSES,
    "seq2seq": Use(*_SPEECH, "AutoModelForSpeechSeq2Seq", "Processor", _AUDIO),
    "ctc": Use(*_SPEECH, "AutoModelForCTC", "Processor", _AUDIO),
    "embedding": Use("feature-extraction", "Feature Extraction", "AutoModel", "", _LOAD_ONLY),
}
_IMAGE_CLASSES = Use(
    *("image-classification", "Image Classification", "AutoModelForImageClassification", "ImageProcessor", _IMAGE)
)
_PICTURE = {
    "classification": _IMAGE_CLASSES,
    "regression": _IMAGE_CLASSES,
    "embedding": Use("image-feature-extraction", "Image Feature Extraction", "AutoModel", "", _LOAD_ONLY),
}
_BY_INPUT = {"input_ids": _TEXT, "input_values": _SOUND, "input_features": _SOUND, "pixel_values": _PICTURE}


def use_of(facts: CardData) -> Use | None:
    """Return how to use the student, or None for a task or an input that the tables above do not hold."""
    return _BY_INPUT.get(facts.student.main_input, {}).get(facts.task)


def program(facts: CardData) -> str | None:
    """Return a Python program that loads the student and calls it, or None if none would run.

    Without a Hub repository it loads from ".", the folder that holds the card.
    """
    use = use_of(facts)
    if use is None or (facts.student.adapter and facts.base_model is None):
        return None
    words = {"tag": use.tag, "auto": use.auto, "model": facts.repo_id or "."}
    words["pooled"] = _POOLING.get(facts.pooling or "", "")
    name = facts.processing_class
    has_inputs = name is not None and (use.processor in name or "Processor" in name)
    pools = use is _TEXT["embedding"] and facts.pooling is not None
    if facts.student.adapter is None:
        load = _LOAD.format(**words)
        text = _LOAD_ONLY if not has_inputs else _EMBED if pools else use.program
        return text.format(**words, load=load)
    count = facts.student.labels if facts.task in COUNTS_LABELS else None
    load = _LOAD_ADAPTER.format(**words, base=facts.base_model, labels=f", num_labels={count}" if count else "")
    text = _LOAD_ONLY  # a pipeline does not load the adapter's base
    if use in _TEXT.values() and has_inputs:
        text = _EMBED if pools else _FORWARD
    return "from peft import PeftModel\n" + text.format(**words, load=load)
