"""How to load and call a student: its Auto class, its pipeline tag, and a program."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_distill.hub.facts import CardData

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # the output is Markdown or Python: texts from users are escaped for that
)
COUNTS_LABELS = ("classification", "regression", "token_classification")
POOLED = {
    "mean": "the mean of its last hidden states over the attended positions",
    "first": "its last hidden state at the first attended position",
    "last": "its last hidden state at the last attended position",
}

Program = Literal["text", "mask", "generate", "audio", "image", "choice", "span", "seq2seq", "forward", "embed", "load"]
"""A program in `program.py.jinja`."""


class Use(NamedTuple):
    """How a kind of student is used.

    Attributes:
        tag: the pipeline tag of the Hub.
        title: the tag in words.
        auto: the Auto class that loads the student.
        processor: a part of the names of processing classes that make the inputs of this program.
        program: the name of the program.
    """

    tag: str
    title: str
    auto: str
    processor: str
    program: Program


_TEXT_CLASSES = Use("text-classification", "Text Classification", "AutoModelForSequenceClassification", "Token", "text")
_TEXT = {
    "classification": _TEXT_CLASSES,
    "regression": _TEXT_CLASSES,
    "multiple_choice": Use("multiple-choice", "Multiple Choice", "AutoModelForMultipleChoice", "Token", "choice"),
    "token_classification": Use(
        "token-classification", "Token Classification", "AutoModelForTokenClassification", "Token", "text"
    ),
    "span": Use("question-answering", "Question Answering", "AutoModelForQuestionAnswering", "Token", "span"),
    "masked_lm": Use("fill-mask", "Masked Language Modeling", "AutoModelForMaskedLM", "Token", "mask"),
    "causal_lm": Use("text-generation", "Causal Language Modeling", "AutoModelForCausalLM", "Token", "generate"),
    "seq2seq": Use(
        "text2text-generation", "Sequence-to-sequence Language Modeling", "AutoModelForSeq2SeqLM", "Token", "seq2seq"
    ),
    "embedding": Use("feature-extraction", "Feature Extraction", "AutoModel", "Token", "forward"),
}
_AUDIO_CLASSES = Use(
    "audio-classification", "Audio Classification", "AutoModelForAudioClassification", "FeatureExtractor", "audio"
)
_SPEECH = ("automatic-speech-recognition", "Automatic Speech Recognition")
_SOUND = {
    "classification": _AUDIO_CLASSES,
    "regression": _AUDIO_CLASSES,
    "seq2seq": Use(*_SPEECH, "AutoModelForSpeechSeq2Seq", "Processor", "audio"),
    "ctc": Use(*_SPEECH, "AutoModelForCTC", "Processor", "audio"),
    "embedding": Use("feature-extraction", "Feature Extraction", "AutoModel", "", "load"),
}
_IMAGE_CLASSES = Use(
    "image-classification", "Image Classification", "AutoModelForImageClassification", "ImageProcessor", "image"
)
_PICTURE = {
    "classification": _IMAGE_CLASSES,
    "regression": _IMAGE_CLASSES,
    "embedding": Use("image-feature-extraction", "Image Feature Extraction", "AutoModel", "", "load"),
}
_BY_INPUT = {"input_ids": _TEXT, "input_values": _SOUND, "input_features": _SOUND, "pixel_values": _PICTURE}


def use_of(facts: CardData) -> Use | None:
    """Return how to use the student, or None for a task or an input that the tables above do not hold."""
    return _BY_INPUT.get(facts.student.main_input, {}).get(facts.task)


def program(facts: CardData) -> str | None:
    """Return a Python program that loads the student and calls it, or None if none would run.

    Without a Hub repository it loads from ".", the folder that holds the card.
    """
    use, adapter = use_of(facts), facts.student.adapter
    if use is None or (adapter and facts.base_model is None):
        return None
    name = facts.processing_class
    chosen = use.program
    if name is None or not (use.processor in name or "Processor" in name):
        chosen = "load"  # the processing class does not make this program's inputs
    elif use is _TEXT["embedding"] and facts.pooling is not None:
        chosen = "embed"
    elif adapter:  # a pipeline does not load an adapter's base
        chosen = "forward" if use in _TEXT.values() else "load"
    return TEMPLATES.get_template("program.py.jinja").render(
        program=chosen,
        tag=use.tag,
        auto=use.auto,
        model=facts.repo_id or ".",
        base=facts.base_model if adapter else None,
        labels=facts.student.labels if facts.task in COUNTS_LABELS else None,
        pooling=facts.pooling,
    )
