"""Settings of `generate` take effect; a setting that transformers would ignore raises an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as tf

from hf_distill import SettingError
from hf_distill.models.generation import generation_settings, set_generation, source_of, window_of
from tests.heads import HEADS
from tests.tiny_whisper import FRAMES, whisper

ASKED = {"max_new_tokens": 4, "do_sample": False, "sampling_temperature": 1.0}


def test_settings_that_transformers_ignores_are_named() -> None:
    """`GenerationConfig.update` drops the language and task of a published Whisper without an error."""
    settings = whisper().generation_config
    assert set(settings.update(language="english", task="transcribe")) == {"language", "task"}
    with pytest.raises(SettingError, match="transformers' generate has no setting language, task"):
        set_generation(settings, {"language": "english", "task": "transcribe", "num_beams": 2})
    set_generation(settings, {"language": "english", "num_beams": 3}, own=("language", "task"))
    assert (settings.language, settings.num_beams, hasattr(settings, "task")) == ("english", 3, False)
    with pytest.raises(SettingError, match="transformers refuses these settings of generate: Invalid `cache_impl"):
        set_generation(settings, {"cache_implementation": "no such cache"})


def test_whisper_settings_survive_saving(tmp_path: Path) -> None:
    settings = generation_settings(whisper(), **ASKED, others={"language": "de", "return_timestamps": True})
    settings.save_pretrained(tmp_path)
    read = tf.GenerationConfig.from_pretrained(tmp_path)
    assert (read.language, read.return_timestamps, read.is_multilingual) == ("de", True, True)


@pytest.mark.parametrize("name", ["top_k", "top_p", "temperature", "min_p"])
def test_sampling_settings_without_sampling_are_rejected(name: str) -> None:
    """generate would ignore them and decode greedily."""
    model, values = HEADS["llama_causal_lm"].make(1), {name: 5 if name == "top_k" else 0.5}
    with pytest.raises(SettingError, match=f"{name}=.* without sampling changes nothing. Pass do_sample=True"):
        generation_settings(model, **ASKED, others=values)
    taken = generation_settings(model, **{**ASKED, "do_sample": True}, others=values)
    assert getattr(taken, name) == values[name]
    assert generation_settings(model, **ASKED, others={name: None}).do_sample is False


def test_inputs_and_windows_of_generating_models() -> None:
    assert source_of(HEADS["llama_causal_lm"].make(1)) == source_of(HEADS["t5_seq2seq"].make(1)) == "input_ids"
    assert source_of(whisper()) == "input_features"
    assert (window_of(whisper()), window_of(HEADS["t5_seq2seq"].make(1))) == (FRAMES, None)
