"""A chain that is not valid raises before any training, with a message that says what to do."""

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
        (lambda: Chain([]), "pass a list of one or more Link(name, model=..., arguments=...)"),
        (lambda: Chain([MODEL]), "pass a list of one or more Link(name"),
        (lambda: Chain([links()[0], links()[0]]), "two links are called 'assistant'; the links are assistant, assis"),
        (lambda: Chain(links(), keep="first"), "keep='first': allowed are best, last"),
        (lambda: Chain([Link("a", MODEL), Link("b", MODEL)]), "two links have the same model. Each link needs its own"),
        (lambda: Link("a/b", MODEL), "link 'a/b': it names a folder. Use letters"),
        (lambda: Link("a", "bert"), "link 'a': model is a str. Pass a model, or a function"),
        (lambda: Link("a", MODEL, objectives=[HiddenMatch()], stages=[Stage("b")]), "both objectives and stages"),
        (lambda: Chain.generations(lambda: MODEL, 0), "n=0 must be at least 1"),
        (lambda: Chain.generations(MODEL, 2), "make_model a function that makes a model"),
    ],
)  # fmt: skip
def test_invalid_chains(make: Any, message: str) -> None:
    with pytest.raises(SettingError, match=re.escape(message)):
        make()


def assert_raises(tmp_path, message: str, listed: Any = None, **keywords: Any) -> None:
    with pytest.raises(SettingError, match=re.escape(message)):
        run(tmp_path, Chain(listed or links(), keep=keywords.pop("keep", "best")), **keywords)
    assert not list(tmp_path.rglob("begun.json"))


def later(**changed: Any) -> list[Link]:
    """Return a valid first link, and a second one that is not valid."""
    return [Link("first", lambda: student(1)), Link("second", lambda: student(1), **changed)]


@pytest.mark.parametrize(
    ("listed", "keywords", "message"),
    [
        (later(arguments={"temprature": 2.0}), {}, "link 'second': stage 'training': there is no argument 'temprat"),
        (later(arguments={"alpha": 2.0}), {}, "link 'second': stage 'training': alpha=2: must lie in"),
        (later(keywords={"train_dtaset": []}), {}, "link 'second': stage 'training': there is no keyword 'train_dtas"),
        (later(keywords={"eval_dataset": []}), {}, "link 'second': eval_dataset= must be the same for all students"),
        (later(stages=[Stage("x"), Stage("x")]), {}, "link 'second': two stages are called 'x'"),
        (None, {"objectives": [HiddenMatch()]}, "link 'assistant': train_in_stages: objectives= does not belong here"),
        (None, {"trainer_class": dict}, "Chain.run: trainer_class=<class 'dict'> is not a class with Distilla"),
        (None, {"resume_from_checkpoint": "x"}, "resume_from_checkpoint='x'. Pass True or False"),
        (None, {"settings": {"push_to_hub": True}}, "push_to_hub=True, but the kept student is known only at the end"),
        (None, {"eval_dataset": None}, "keep='best' needs an eval_dataset to find the best student. Pass eval"),
    ],
)  # fmt: skip
def test_invalid_runs(tmp_path, listed: Any, keywords: dict[str, Any], message: str) -> None:
    assert_raises(tmp_path, message, listed, **keywords)


def test_later_links_have_no_inputs_of_the_first_teacher(tmp_path) -> None:
    rows = [{**example, "teacher_input_ids": example["input_ids"]} for example in examples(4)]
    message = "link 'half': train_dataset has teacher_input_ids, inputs of the first teacher"
    assert_raises(tmp_path, message, train_dataset=Dataset.from_list(rows))


def test_the_function_must_return_a_model(tmp_path) -> None:
    assert_raises(
        tmp_path, "link 'a': the function returned a str. It must return the student", [Link("a", lambda: "bert")]
    )


def test_a_function_of_the_teacher_needs_a_model(tmp_path) -> None:
    made_of = [Link("a", lambda teacher: student(1))]
    assert_raises(tmp_path, "the teacher of the run is a str. Load it, and pass", made_of, teacher_model="some/where")


def test_only_the_last_student_may_have_adapters(tmp_path) -> None:
    def adapted() -> nn.Module:
        return with_lora(student(1), "query", "value", rank=2)

    assert_raises(
        tmp_path, "link 'a': the student has adapters, and only the last link's", [Link("a", adapted), *later()]
    )


def test_a_metric_that_the_evaluation_does_not_return(tmp_path) -> None:
    with pytest.raises(
        SettingError, match=r"link 'first': metric_for_best_model='f1': the evaluation gave .*eval_accu"
    ):
        run(tmp_path, Chain(later()), settings={"metric_for_best_model": "f1", "max_steps": 1})
