"""What cannot be a chain is refused before anything is trained, with the way out."""

from __future__ import annotations

import re
from typing import Any

import pytest
from datasets import Dataset
from torch import nn

from hf_distill import HiddenMatch, SettingError
from hf_distill.presets import Stage
from hf_distill.runs import Chain, Link
from tests.lora import with_lora
from tests.runs.tiny_chain import links, run, student
from tests.trainer.tiny import bert, examples

MODEL = bert()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chain([]), "give at least one Link(name, model=..., arguments=...), in a list"),
        (lambda: Chain([MODEL]), "give at least one Link(name"),
        (lambda: Chain([links()[0], links()[0]]), "two links are called 'assistant'; the links are assistant, assis"),
        (lambda: Chain(links(), keep="first"), "keep='first': allowed are best, last"),
        (lambda: Chain([Link("a", MODEL), Link("b", MODEL)]), "one model stands in two links. Each needs a student"),
        (lambda: Link("a/b", MODEL), "link 'a/b': it names a folder. Use letters"),
        (lambda: Link("a", "bert"), "link 'a': model is a str. Give a model, or a function that makes it"),
        (lambda: Link("a", MODEL, objectives=[HiddenMatch()], stages=[Stage("b")]), "objectives beside stages"),
        (lambda: Chain.generations(lambda: MODEL, 0), "n=0: must be a whole number, at least 1"),
        (lambda: Chain.generations(MODEL, 2), "make_model is a model. Give a function that makes one"),
    ],
)  # fmt: skip
def test_chains_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(SettingError, match=re.escape(message)):
        make()


def refused(tmp_path, message: str, listed: Any = None, **keywords: Any) -> None:
    with pytest.raises(SettingError, match=re.escape(message)):
        run(tmp_path, Chain(listed or links(), keep=keywords.pop("keep", "best")), **keywords)
    assert not list(tmp_path.rglob("begun.json"))


def later(**changed: Any) -> list[Link]:
    """A first link that could be trained, and a second that cannot."""
    return [Link("first", lambda: student(1)), Link("second", lambda: student(1), **changed)]


@pytest.mark.parametrize(
    ("listed", "keywords", "message"),
    [
        (later(arguments={"temprature": 2.0}), {}, "link 'second': stage 'training': there is no argument 'temprat"),
        (later(arguments={"alpha": 2.0}), {}, "link 'second': stage 'training': alpha=2: must lie in"),
        (later(keywords={"train_dtaset": []}), {}, "link 'second': stage 'training': there is no keyword 'train_dtas"),
        (later(keywords={"eval_dataset": []}), {}, "link 'second': eval_dataset= does not go here: students are comp"),
        (later(stages=[Stage("x"), Stage("x")]), {}, "link 'second': two stages are called 'x'"),
        (None, {"objectives": [HiddenMatch()]}, "link 'assistant': train_in_stages: objectives= does not go here"),
        (None, {"trainer_class": dict}, "Chain.run: trainer_class=<class 'dict'>. Give DistillationTrainer"),
        (None, {"resume_from_checkpoint": "x"}, "resume_from_checkpoint='x'. True or False"),
        (None, {"settings": {"push_to_hub": True}}, "push_to_hub=True: which student is kept is known at the end"),
        (None, {"eval_dataset": None}, "there is no eval_dataset to find it by. Pass eval_dataset=, or Chain(..., k"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be(tmp_path, listed: Any, keywords: dict[str, Any], message: str) -> None:
    refused(tmp_path, message, listed, **keywords)


def test_inputs_of_the_first_teacher_are_none_of_the_second(tmp_path) -> None:
    rows = [{**example, "teacher_input_ids": example["input_ids"]} for example in examples(4)]
    message = "link 'half': train_dataset has teacher_input_ids: inputs of the first teacher"
    refused(tmp_path, message, train_dataset=Dataset.from_list(rows))


def test_a_function_that_makes_no_model(tmp_path) -> None:
    refused(tmp_path, "link 'a': its function made a str. It must return the student", [Link("a", lambda: "bert")])


def test_a_function_of_a_teacher_that_is_no_model(tmp_path) -> None:
    made_of = [Link("a", lambda teacher: student(1))]
    refused(
        tmp_path, "the teacher of the run is no model (str). Load it, and pass", made_of, teacher_model="some/where"
    )


def test_adapters_stand_last(tmp_path) -> None:
    def adapted() -> nn.Module:
        return with_lora(student(1), "query", "value", rank=2)

    refused(tmp_path, "link 'a': its student has adapters, and only the last link's", [Link("a", adapted), *later()])


def test_a_metric_that_nobody_returns(tmp_path) -> None:
    with pytest.raises(
        SettingError, match=r"link 'first': metric_for_best_model='f1': the evaluation gave .*eval_accu"
    ):
        run(tmp_path, Chain(later()), settings={"metric_for_best_model": "f1", "max_steps": 1})
