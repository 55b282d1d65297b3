"""generate_completions: texts by hand, every kind of prompt, kill and resume to the same bytes, training on them."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from hf_distill import DataError, SettingError, generate_completions
from hf_distill.cli.main import main
from hf_distill.models.generation import set_generation
from hf_distill.teachers.passes import ShardedPass
from tests.augment.test_on_policy import greedy
from tests.heads import HEADS
from tests.teachers.cache.built import contents
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import make

LLAMA = HEADS["llama_causal_lm"]
ANSWERED = datasets.Dataset.from_list(LLAMA.examples(7))  # prompts of unequal length, then gold labels
SHORT = {"max_new_tokens": 5, "batch_size": 3, "shard_examples": 4}


def prompt_of(example: dict[str, Any]) -> list[int]:
    return [token for i, token in enumerate(example["input_ids"]) if i == 0 or not any(
        label != -100 for label in example["labels"][1 : i + 1]
    )]  # fmt: skip


def test_completions_equal_greedy_texts_and_train_a_student(tmp_path) -> None:
    """Padded prompts of different lengths, as each alone; gold answers are ignored."""
    teacher, words = LLAMA.make(2), tokenizer(40)
    made = generate_completions(teacher, ANSWERED, tmp_path / "made", processing_class=words, **SHORT)
    for index, (row, example) in enumerate(zip(made, ANSWERED, strict=True)):
        prompt = prompt_of(example)
        written = greedy(teacher.eval(), prompt, 5)
        assert (row["index"], row["input_ids"]) == (index, prompt + written)
        assert row["labels"] == [-100] * len(prompt) + written
        assert row["finished"] == (written[-1] == 2)
        assert (row["prompt"], row["completion"]) == (words.decode(prompt), words.decode(written))
    again = datasets.load_from_disk(str(tmp_path / "made"))
    assert again.to_list() == made.to_list()
    trainer = make(
        tmp_path, LLAMA.make(1), teacher, train_dataset=again, data_collator=DataCollatorForSeq2Seq(words), alpha=0.5,
        processing_class=words, teacher_processing_class=words, max_steps=1, logging_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss/labels"] > 0.1 and trainer.state.log_history[0]["loss/logits"] > 0.1


def test_beams_equal_those_of_generate(tmp_path) -> None:
    """Kim and Rush use beam search. With one prompt per batch nothing is padded."""
    teacher = LLAMA.make(2)
    settings = {"num_return_sequences": 2, "generation": {"num_beams": 3, "length_penalty": 0.5}}
    made = generate_completions(teacher, ANSWERED, tmp_path / "made", max_new_tokens=4, batch_size=1, **settings)
    assert made["index"][:] == [i for i in range(7) for _ in range(2)]
    for index in (0, 3):
        ids = torch.tensor([prompt_of(ANSWERED[index])])
        expected = teacher.generate(
            input_ids=ids, max_new_tokens=4, num_beams=3, length_penalty=0.5, num_return_sequences=2, do_sample=False
        )
        for row, sequence in zip(made.select([2 * index, 2 * index + 1]), expected.tolist(), strict=True):
            assert row["input_ids"] == sequence[: len(row["input_ids"])]
            assert row["finished"] or len(row["input_ids"]) == len(sequence)


def test_a_killed_pass_resumes_to_the_same_bytes(tmp_path, monkeypatch) -> None:
    teacher, sampled = LLAMA.make(2), {**SHORT, "do_sample": True, "num_return_sequences": 2, "seed": 3}
    whole = generate_completions(teacher, ANSWERED, tmp_path / "whole", **sampled)
    write = ShardedPass.write_shard

    def killed(self: ShardedPass, shard: int, *rest: Any, **facts: Any) -> None:
        if shard == 1:
            raise KeyboardInterrupt
        write(self, shard, *rest, **facts)

    monkeypatch.setattr(ShardedPass, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt, match=r"completions of 4 of 7 prompts are kept in .*the same call continues"):
        generate_completions(teacher, ANSWERED, tmp_path / "killed", **sampled)
    monkeypatch.setattr(ShardedPass, "write_shard", write)
    with pytest.raises(DataError, match=r"unfinished completions of something else: seed: 3 there, 4 now"):
        generate_completions(teacher, ANSWERED, tmp_path / "killed", **{**sampled, "seed": 4})
    with pytest.raises(
        DataError, match=r"was made from other examples, .*: the dataset differs at index 0 to 3\. Give"
    ):
        generate_completions(teacher, ANSWERED.select(range(6, -1, -1)), tmp_path / "killed", **sampled)
    torch.rand(3)  # the global random state must not matter
    resumed = generate_completions(teacher, ANSWERED, tmp_path / "killed", **sampled)
    assert resumed.to_list() == whole.to_list()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(contents(tmp_path / "whole")) == [
        "README.md", "completions.json", "dataset_info.json", "shard-00000.arrow", "shard-00001.arrow", "state.json"
    ]  # fmt: skip
    teacher.generate = None  # must not be called
    monkeypatch.setattr(type(teacher), "can_generate", lambda self: True)
    assert generate_completions(teacher, ANSWERED, tmp_path / "killed", **sampled).to_list() == whole.to_list()


def test_samples_use_all_tokens_and_depend_on_the_seed(tmp_path) -> None:
    teacher = LLAMA.make(2, vocab_size=90)
    set_generation(teacher.generation_config, dict(top_k=2, temperature=0.01))
    data = datasets.Dataset.from_dict({"input_ids": [[5, 6], [5, 6]]})  # in batches of one: each has its own draws
    settings = {
        "batch_size": 1,
        "max_new_tokens": 1,
        "do_sample": True,
        "num_return_sequences": 700,
        "sampling_temperature": 1e4,
    }
    made = [generate_completions(teacher, data, tmp_path / str(i), **settings, seed=i % 2) for i in range(3)]
    drawn = [[ids[-1] for ids in one["input_ids"]] for one in made]
    assert len(set(drawn[0])) > 85 and drawn[0] == drawn[2] != drawn[1] and drawn[0][:700] != drawn[0][700:]


def test_texts_and_messages_are_prompts(tmp_path) -> None:
    teacher, words = LLAMA.make(2), tokenizer(40)
    words.eos_token = "w2"
    texts = datasets.Dataset.from_dict({"question": ["w5 w6 w7", "w8 w2"]})  # w2: an end token added by the tokenizer
    made = generate_completions(
        teacher, texts, tmp_path / "1", processing_class=words, prompt_column="question", **SHORT
    )
    assert made["prompt"][:] == ["w5 w6 w7", "w8"]
    assert made["input_ids"][0][:3] == [5, 6, 7] and made["labels"][1][:1] == [-100]
    words.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    )
    chats = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "w5 w6"}]]})
    made = generate_completions(teacher, chats, tmp_path / "2", processing_class=words, **SHORT)
    assert made["input_ids"][0][:3] == [5, 6, 9] and made["labels"][0][:4].count(-100) == 3


def test_completions_of_an_encoder_decoder(tmp_path) -> None:
    t5 = HEADS["t5_seq2seq"].make(2)
    sources = datasets.Dataset.from_list(HEADS["t5_seq2seq"].examples(4))
    made = generate_completions(t5, sources, tmp_path / "1", **SHORT)
    for row, source in zip(made, sources, strict=True):
        written: list[int] = []
        while len(written) < 5 and 2 not in written:
            ids = torch.tensor([source["input_ids"]]), torch.tensor([[0, *written]])
            with torch.no_grad():
                written.append(int(t5.eval()(input_ids=ids[0], decoder_input_ids=ids[1]).logits[0, -1].argmax()))
        assert (row["input_ids"], row["labels"]) == (source["input_ids"], written)


def test_completions_of_a_teacher_in_a_folder(tmp_path) -> None:
    teacher, words = LLAMA.make(2), tokenizer(40)
    teacher.save_pretrained(tmp_path / "teacher")
    words.save_pretrained(tmp_path / "teacher")
    texts = datasets.Dataset.from_dict({"prompt": ["w5 w6 w7"]})
    made = generate_completions(str(tmp_path / "teacher"), texts, tmp_path / "made", **SHORT)
    assert made["input_ids"][0] == [5, 6, 7, *greedy(teacher.eval(), [5, 6, 7], 5)]
    assert str(tmp_path) not in (tmp_path / "made" / "completions.json").read_text()


def test_the_command_writes_the_same_bytes(tmp_path, capsys) -> None:
    """As the function does; the library's errors take one line."""
    teacher, words = LLAMA.make(2), tokenizer(40)
    teacher.save_pretrained(tmp_path / "teacher")
    words.save_pretrained(tmp_path / "teacher")
    texts = datasets.Dataset.from_dict({"question": ["w5 w6 w7", "w8"]})
    texts.save_to_disk(str(tmp_path / "texts"))
    command = ["complete", *(str(tmp_path / name) for name in ("teacher", "texts", "made"))]
    sampled = [
        "--prompt-column",
        "question",
        "--sample",
        "--sampling-temperature",
        "2",
        "--answers",
        "3",
        "--seed",
        "5",
    ]
    assert main([*command, "--max-new-tokens", "4", *sampled]) == 0
    assert "6 answers in" in capsys.readouterr().out
    generate_completions(
        str(tmp_path / "teacher"), texts, tmp_path / "expected", prompt_column="question", max_new_tokens=4,
        do_sample=True, sampling_temperature=2.0, num_return_sequences=3, seed=5, generation={"num_beams": 1},
    )  # fmt: skip
    assert contents(tmp_path / "made") == contents(tmp_path / "expected")
    assert main([*command, "--max-new-tokens", "4"]) == 2
    assert "no column prompt or input_ids" in capsys.readouterr().err


def test_invalid_arguments_raise(tmp_path) -> None:
    teacher, here = LLAMA.make(2), tmp_path / "made"
    for settings, message in (
        ({"num_return_sequences": 2}, "num_return_sequences=2 of the likeliest text are the same text"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0 \(1 or more\)"),
        ({"do_sample": True, "sampling_temperature": 0.0}, r"sampling_temperature=0.0 \(above 0"),
        ({"generation": {"num_beems": 2}}, "no setting num_beems"),
    ):
        with pytest.raises(SettingError, match=message):
            generate_completions(teacher, ANSWERED, here, **settings)
    with pytest.raises(SettingError, match="BertForMaskedLM cannot generate: it has no head that writes text"):
        generate_completions(HEADS["bert_masked_lm"].make(1), ANSWERED, here)
    with pytest.raises(DataError, match=r"no column prompt or input_ids, only \['x'\]. Name the column of the prompts"):
        generate_completions(teacher, datasets.Dataset.from_dict({"x": [1]}), here)
    with pytest.raises(DataError, match="the dataset has no prompts"):
        generate_completions(teacher, ANSWERED.select([]), here)
    assert not here.exists()
    here.mkdir()
    (here / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other files than completions"):
        generate_completions(teacher, ANSWERED, here, **SHORT)


def test_a_folder_belongs_to_one_teacher_and_its_settings(tmp_path) -> None:
    """A finished folder is opened; with other settings it is left unchanged."""
    generate_completions(LLAMA.make(2), ANSWERED, tmp_path, **SHORT)
    before = contents(tmp_path)
    for teacher, data, settings, message in (
        (LLAMA.make(3), ANSWERED, {}, "holds completions of something else: teacher.weights: "),
        (LLAMA.make(2), ANSWERED, {"max_new_tokens": 4}, "generation.max_new_tokens: 5 there, 4 now. Choose another"),
        (LLAMA.make(2), ANSWERED.select(range(6)), {}, "examples: 7 there, 6 now"),
        (LLAMA.make(2), ANSWERED.select([1, 0, *range(2, 7)]), {}, "the dataset differs at index 0 to 3. Choose"),
    ):
        with pytest.raises(DataError, match=message):
            generate_completions(teacher, data, tmp_path, **{**SHORT, **settings})
        assert contents(tmp_path) == before
