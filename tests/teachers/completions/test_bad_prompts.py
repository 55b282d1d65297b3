"""generate_completions with unusable prompts: errors name them before anything is written.

Valid prompts are in `test_completions.py`.
"""

from __future__ import annotations

import shutil
from typing import Any

import datasets
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, XLNetConfig, XLNetLMHeadModel

from hf_distill import DataError, SettingError, TeacherError, generate_completions
from hf_distill.cli.main import main
from hf_distill.models.generation import generate_causal, generate_seq2seq, generation_settings, set_generation
from hf_distill.teachers.completions.generate import CompletionsPass
from tests.heads import HEADS
from tests.tiny_tokenizers import tokenizer

LLAMA, T5, WHISPER = HEADS["llama_causal_lm"], HEADS["t5_seq2seq"], HEADS["whisper_seq2seq"]
SHORT = {"max_new_tokens": 3, "batch_size": 2, "shard_examples": 2}
TEACHER, WORDS = LLAMA.make(2), tokenizer(40)  # 32 positions
WORDS.chat_template = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
)


def of(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def bart() -> Any:
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    widths = dict(vocab_size=40, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16)
    return BartForConditionalGeneration(BartConfig(**sizes, **widths))


def test_all_prompts_are_checked_before_the_first_shard(tmp_path) -> None:
    """30 tokens plus 3 new ones exceed 32 positions; 29 do not. The rows left by `filter` are completed."""
    texts = of(question=["w5", "w6 " * 29, "w7", "", None, "w8 " * 30, "w9", None, None])
    with pytest.raises(DataError) as message:
        generate_completions(TEACHER, texts, tmp_path / "1", processing_class=WORDS, prompt_column="question", **SHORT)
    assert str(message.value) == (
        "5 of 9 prompts cannot be used. question[3]: an empty prompt, which nothing can be written to: begin it with "
        "a token; question[4]: None instead of a prompt; question[5]: a prompt of 30 tokens and max_new_tokens=3 "
        "are more than the 32 positions that LlamaForCausalLM knows; question[7]: None instead of a prompt; and "
        "1 more. Correct these rows, or leave them out (dataset.filter)."
    )
    assert not (tmp_path / "1").exists()
    good = texts.filter(lambda row: row["question"] and len(row["question"].split()) < 30)
    made = generate_completions(
        TEACHER, good, tmp_path / "1", processing_class=WORDS, prompt_column="question", **SHORT
    )
    assert made["index"][:] == [0, 1, 2, 3] and made["prompt"][3] == "w9"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": [[5], None]}, r"input_ids\[1\]: None instead of a prompt"),
        (
            {"input_ids": [[5], [6, 40]]},
            r"input_ids\[1\]: a prompt with token id 40, of which LlamaForCausalLM knows 0 to",
        ),
        ({"input_ids": [[[5]]]}, r"input_ids\[0\]: not a list of token ids with a mask and labels of its length"),
        ({"input_ids": [[5, 6]], "labels": [[5]]}, r"input_ids\[0\]: not a list of token ids with a mask and labels"),
        ({"prompt": [5]}, r"prompt\[0\]: of type int, not a text or a list of messages .*input_ids"),
        ({"prompt": [[{"role": "assistant", "content": "w5"}]]}, r"prompt\[0\]: only messages of the assistant"),
        ({"prompt": [[{"role": "user"}], [{"content": "w5"}]]}, None),
    ],
)
def test_invalid_rows_are_described(tmp_path, columns: dict[str, list[Any]], message: str | None) -> None:
    if message is None:  # a template may raise with its own message
        words = tokenizer(40)
        words.chat_template = "{{ raise_exception('roles must alternate') }}"
        message = r"prompt\[0\]: messages that the chat template rejects \(roles must alternate\); prompt\[1\]"
    else:
        words = WORDS
    with pytest.raises(DataError, match=message):
        generate_completions(TEACHER, of(**columns), tmp_path / "1", processing_class=words, **SHORT)
    assert not (tmp_path / "1").exists()


def test_missing_columns_and_templates_raise(tmp_path) -> None:
    """`input_ids` replaces only the default column."""
    both = of(question=["w5"], input_ids=[[9]])
    with pytest.raises(DataError, match=r"no column qestion, only \['input_ids', 'question'\]"):
        generate_completions(TEACHER, both, tmp_path, processing_class=WORDS, prompt_column="qestion")
    with pytest.raises(DataError, match="a IterableDataset has no length"):
        generate_completions(TEACHER, both.to_iterable_dataset(), tmp_path)
    with pytest.raises(SettingError, match="prompt holds messages, and the tokenizer has no chat_template"):
        chats = of(prompt=[[{"role": "user", "content": "w5"}]])
        generate_completions(TEACHER, chats, tmp_path, processing_class=tokenizer(40), **SHORT)
    with pytest.raises(
        SettingError, match="prompt_column='text': WhisperForConditionalGeneration reads input_features"
    ):
        generate_completions(WHISPER.make(1), both, tmp_path, processing_class=WORDS, prompt_column="text", **SHORT)
    with pytest.raises(SettingError, match="no setting language"):  # only Whisper has it
        generate_completions(TEACHER, both, tmp_path, generation={"language": "en"}, **SHORT)
    assert not any(tmp_path.iterdir())


def test_gold_answers_in_messages_are_removed(tmp_path) -> None:
    """As for `input_ids`: the prompt ends with the user's last message."""
    user, gold = [{"role": "user", "content": "w5 w6"}], [{"role": "assistant", "content": "w30 w31"}]
    chats = of(messages=[user + gold, user, user + gold + user + gold + gold])
    made = generate_completions(
        TEACHER, chats, tmp_path / "1", processing_class=WORDS, prompt_column="messages", **SHORT
    )
    assert made["prompt"][:] == ["w5 w6 w9", "w5 w6 w9", "w5 w6 w30 w31 w5 w6 w9"]
    assert made["input_ids"][0] == made["input_ids"][1]


def test_inputs_of_an_encoder_decoder_exclude_answers(tmp_path) -> None:
    model = bart()
    too_long = (
        r"2 of 3 .*input_ids\[1\]: a source of 17 tokens is more than the 16 positions that BartFor.*\[2\]: an empty"
    )
    too_much = "max_new_tokens=17 are more than the 16 positions that the decoder of BartFor"
    for settings, message in (({"max_new_tokens": 4}, too_long), ({"max_new_tokens": 17}, too_much)):
        with pytest.raises((DataError, SettingError), match=message):
            generate_completions(model, of(input_ids=[[5] * 16, [5] * 17, []]), tmp_path / "1", **settings)
    assert not (tmp_path / "1").exists()
    assert len(generate_completions(model, of(input_ids=[[5] * 16]), tmp_path / "1", max_new_tokens=16)) == 1
    asked = generation_settings(model, max_new_tokens=2, do_sample=False, sampling_temperature=1.0)
    with pytest.raises(DataError, match="a source of 17 tokens, padding included, more than the 16 positions"):
        generate_seq2seq(model, {"input_ids": torch.full((1, 17), 5)}, asked)
    with pytest.raises(DataError, match="an empty source"):
        generate_seq2seq(
            model, {"input_ids": torch.full((2, 3), 5), "attention_mask": torch.eye(2, 3).long() * 0}, asked
        )


def test_padding_in_a_dataset_is_removed_from_the_source(tmp_path) -> None:
    teacher = T5.make(2)
    padded = of(input_ids=[[5, 6, 7, 0, 0]], attention_mask=[[1, 1, 1, 0, 0]])
    made = [
        generate_completions(teacher, data, tmp_path / str(i), **SHORT)
        for i, data in enumerate((padded, of(input_ids=[[5, 6, 7]])))
    ]
    assert made[0].to_list() == made[1].to_list() and made[0]["input_ids"][0] == [5, 6, 7]


def test_recordings_of_unequal_length_raise(tmp_path) -> None:
    sounds = of(input_features=[torch.ones(8, 20).tolist(), torch.ones(8, 18).tolist(), None])
    with pytest.raises(
        DataError, match=r"2 of 3 .*\[1\]: a sound of shape \[8, 18\], and others are \[8, 20\].*\[2\]: "
    ):
        generate_completions(WHISPER.make(2), sounds, tmp_path / "1", processing_class=WORDS, max_new_tokens=3)


def test_unlimited_positions_have_no_limit() -> None:
    """XLNet's config has -1."""
    sizes = dict(vocab_size=40, d_model=8, n_layer=1, n_head=2, d_inner=8, pad_token_id=0, eos_token_id=2)
    model = XLNetLMHeadModel(XLNetConfig(**sizes))
    assert model.config.max_position_embeddings == -1
    settings = generation_settings(model, max_new_tokens=2, do_sample=False, sampling_temperature=1.0)
    assert len(generate_causal(model, [[5, 6, 7]], settings)[0]) in (1, 2)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"num_beams": 0}, "num_beams=0: a whole number, at least 1"),
        ({"num_beams": 2.0}, "num_beams=2.0: a whole number"),
        ({"max_new_tokens": None}, r"max_new_tokens=None \(1 or more\)"),
        ({"do_sample": True, "temperature": 0}, r"sampling_temperature=0 \(above 0"),
        ({"num_beams": 2, "do_sample": True, "num_return_sequences": 3}, "transformers refuses .*num_return_sequences"),
        ({"stop_strings": ["w5"]}, r"stop_strings=\['w5'\] cannot be used: a text ends with a token here"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True cannot be used: it changes what `generate`"),
        ({"max_length": 9}, "max_length=9 cannot be used: .*max_new_tokens"),
    ],
)
def test_invalid_settings_raise_before_anything_is_written(tmp_path, generation: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        generate_completions(TEACHER, of(input_ids=[[5]]), tmp_path / "1", **SHORT, generation=generation)
    assert not (tmp_path / "1").exists()


def test_the_teachers_generation_config_is_followed(tmp_path) -> None:
    """Return formats are always ours; None undoes a setting of the teacher; its beams allow two answers."""
    data, teacher = of(input_ids=[[5, 6], [7]]), LLAMA.make(2)
    plain = generate_completions(teacher, data, tmp_path / "1", **SHORT).to_list()
    set_generation(teacher.generation_config, dict(return_dict_in_generate=True, output_scores=True))
    assert generate_completions(teacher, data, tmp_path / "2", **SHORT).to_list() == plain
    written = [row["labels"][len(ids)] for row, ids in zip(plain, data["input_ids"], strict=True)]
    set_generation(teacher.generation_config, dict(suppress_tokens=written, stop_strings=["w5"]))
    undone = {"suppress_tokens": None, "stop_strings": None}
    own = teacher.generation_config
    assert generate_completions(teacher, data, tmp_path / "3", **SHORT, generation=undone).to_list() == plain
    suppressed = generate_completions(teacher, data, tmp_path / "4", **SHORT, generation={"stop_strings": None})
    assert not {row["labels"][-3] for row in suppressed} & set(written)
    assert teacher.generation_config is own
    teacher.generation_config.num_beams = 2
    two = generate_completions(teacher, data, tmp_path / "5", **SHORT, generation=undone, num_return_sequences=2)
    assert two["index"][:] == [0, 0, 1, 1]


def test_sampling_requested_by_generation_settings(tmp_path) -> None:
    """It depends on seed and temperature and uses all tokens, as with `do_sample=True`."""
    teacher, data = LLAMA.make(2), of(input_ids=[[5, 6]] * 8)
    set_generation(teacher.generation_config, dict(min_p=0.999, typical_p=0.01))  # would leave only the likeliest token

    def made(name: str, seed: int = 0, temperature: float = 1e4, **settings: Any) -> list[Any]:
        settings = {"sampling_temperature": temperature, "max_new_tokens": 2, **settings}
        written = generate_completions(teacher, data, tmp_path / name, seed=seed, **settings)
        return [row["labels"][2:] for row in written]

    by_generation = {"generation": {"do_sample": True}}
    first = made("1", **by_generation)
    assert first == made("2", do_sample=True) and len({tuple(text) for text in first}) > 4
    assert made("3", temperature=1e-4, **by_generation) == made("4", temperature=1.0)  # the likeliest tokens
    with pytest.raises(DataError, match="completions of something else: seed: 0 there, 1 now"):
        made("1", seed=1, **by_generation)
    assert made("5", seed=1, **by_generation) != first


def test_a_missing_teacher_gives_a_one_line_error(tmp_path, capsys) -> None:
    """A folder with an adapter is described as such."""
    of(prompt=["w5"]).save_to_disk(str(tmp_path / "texts"))
    capsys.readouterr()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name, message in (
        ("nope", "no such folder"),
        ("texts", "cannot be loaded"),
        ("adapter", "holds a PEFT adapter"),
    ):
        assert main(["complete", *(str(tmp_path / one) for one in (name, "texts", "made"))]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.startswith("hf-distill: error: teacher_model=")
        with pytest.raises(TeacherError, match=message):
            generate_completions(tmp_path / name, of(prompt=["w5"]), tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_damaged_output_folders_raise(tmp_path) -> None:
    data = of(input_ids=[[5, 6], [7], [8]])

    def ask() -> list[Any]:
        return generate_completions(TEACHER, data, tmp_path / "1", **SHORT).to_list()

    whole, shard = ask(), tmp_path / "1" / "shard-00001.arrow"
    shutil.copytree(tmp_path / "1", tmp_path / "copy")
    content = shard.read_bytes()
    for damaged in (content[:100], content[:-1] + b"\1"):
        shard.write_bytes(damaged)
        with pytest.raises(
            DataError, match=r"shard-00001.arrow (has .* it was cut off|was changed).* make the same call again"
        ):
            ask()
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001.arrow is missing"):
        ask()
    shard.write_bytes(content)
    (tmp_path / "1" / "state.json").write_text("[]")
    with pytest.raises(
        DataError, match=r"state.json cannot be read \(no JSON object\). Copy .* make the same call again"
    ):
        ask()
    (tmp_path / "1" / "completions.json").unlink()
    (tmp_path / "1" / "completions-unfinished.json").write_text("")
    with pytest.raises(DataError, match=r"completions-unfinished.json cannot be read .* make the same call again"):
        ask()
    shutil.rmtree(tmp_path / "1")
    shutil.move(tmp_path / "copy", tmp_path / "1")
    assert ask() == whole


def test_a_shard_with_an_unreadable_receipt_is_rewritten(tmp_path, monkeypatch) -> None:
    """To the same bytes."""
    data = of(input_ids=[[5, 6], [7], [8]])
    whole = generate_completions(TEACHER, data, tmp_path / "whole", **SHORT).to_list()
    with monkeypatch.context() as killed:
        killed.setattr(CompletionsPass, "finalize", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate_completions(TEACHER, data, tmp_path / "1", **SHORT)
    (tmp_path / "1" / "shard-00000.json").write_text("")
    assert generate_completions(TEACHER, data, tmp_path / "1", **SHORT).to_list() == whole
