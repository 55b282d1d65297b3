"""Errors of a served teacher over real HTTP; no message contains its address or key."""

from __future__ import annotations

import copy
import logging
import pickle
import traceback
from typing import Any

import pytest
import torch

from hf_distill import Distiller, SettingError, TeacherError
from hf_distill.errors import DataError
from hf_distill.signals import ActivationKey, Needs
from hf_distill.teachers.served import ServedTeacher
from hf_distill.teachers.served import client as endpoint
from tests.heads import VOCABULARY
from tests.laws import measuring as m
from tests.teachers.asking import NAME, SECRET, WORDS, batch_of, distiller_of, served
from tests.teachers.completions_server import CompletionsServer, serving
from tests.tiny_tokenizers import tokenizer


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(endpoint, "LONGEST_WAIT_S", 0.02)


# Unsupported settings and batches.


def test_a_temperature_requires_the_whole_distribution(server: CompletionsServer) -> None:
    with pytest.raises(
        SettingError, match=r"temperature=2: .* 6 most likely tokens at temperature 1 .* Pass temperature=1"
    ):
        distiller_of(served(server), temperature=2.0)
    for name in ("dist", "mean_squared_error", "hard"):  # even with all tokens: there are no logits
        with pytest.raises(SettingError, match=f"divergence='{name}' needs every column"):
            distiller_of(served(server, top_logprobs=VOCABULARY), divergence=name)(m.student_of(NAME), batch_of())
    with pytest.raises(SettingError, match="shows no hidden states"):
        served(server).check(Needs(activations=frozenset({ActivationKey("hidden", 0)})))


def test_other_tasks_inputs_and_packed_texts_raise(server: CompletionsServer) -> None:
    with pytest.raises(TeacherError, match="scores text from left to right; the student is trained for masked_lm"):
        Distiller(m.student_of("bert_masked_lm"), served(server), temperature=1.0)
    distiller, batch = distiller_of(served(server)), batch_of()
    holes = batch["attention_mask"].clone()
    holes[:, 1] = 0
    positions = torch.tensor([[0, 1, 0, 1]])
    packed = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[5, 6, 7, 8]])}
    for wrong, message in (
        ({**batch, "teacher_input_ids": batch["input_ids"]}, "reads the student's input_ids"),
        ({**batch, "attention_mask": holes}, "has holes"),
        ({**packed, "position_ids": positions}, "packed into one row"),
    ):
        with pytest.raises(DataError, match=message):
            distiller.teacher_signals(wrong)


def test_another_tokenizer_raises(server: CompletionsServer, caplog: pytest.LogCaptureFixture) -> None:
    other = tokenizer({f"w{i}": (i + 1) % VOCABULARY for i in range(VOCABULARY)})
    with pytest.raises(TeacherError, match="different tokenizers: 40 tokens have other ids"):
        distiller_of(served(server, processing_class=other))
    with pytest.raises(TeacherError, match=r"the served model has another tokenizer: its token \d+ is 'w\d+'"):
        distiller_of(served(server, processing_class=other), processing_class=other)
    with caplog.at_level(logging.WARNING):
        distiller_of(served(server), processing_class=None)
    assert "The student's tokenizer is not known" in caplog.text


def scores_other_tokens(reply: Any) -> Any:
    reply["choices"][0]["prompt_logprobs"][1] = {"0": {"logprob": 0.0}}  # padding, which is in no text
    return reply


def tells_fewer_positions(reply: Any) -> Any:
    reply["choices"][0]["prompt_logprobs"].pop()
    return reply


def answers_fewer_prompts(reply: Any) -> Any:
    return {"choices": reply["choices"][:-1]}


def lists_fewer_tokens(reply: Any) -> Any:
    for answer in reply:
        meta = answer["meta_info"]
        meta["input_top_logprobs"] = [row and row[:2] for row in meta["input_top_logprobs"]]
    return reply


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (scores_other_tokens, r"token 1 of a prompt was \d+, which it does not score"),
        (tells_fewer_positions, r"it returned \d+ of \d+ positions of a prompt"),
        (answers_fewer_prompts, "it answered 5 of 6 prompts"),
        (lambda reply: {"choices": [{"index": i} for i in range(6)]}, "it ignores prompt_logprobs"),
        (lambda reply: ["something", "else"], "an answer of another form"),
    ],
)
def test_incomplete_and_malformed_replies_raise(server: CompletionsServer, fault: Any, message: str) -> None:
    distiller, batch = distiller_of(served(server)), batch_of()
    server.faults = [fault]
    with pytest.raises(TeacherError, match=message):
        distiller.teacher_signals(batch)


def test_fewer_tokens_than_requested_raise() -> None:
    with serving(m.teacher_of(NAME), WORDS, speaks="sglang") as server:
        distiller = distiller_of(served(server, api="sglang"))
        server.faults = [lists_fewer_tokens]
        with pytest.raises(TeacherError, match="lists 2 tokens at a position, and 6 were asked for"):
            distiller.teacher_signals(batch_of())


@pytest.mark.parametrize(
    ("speaks", "api", "message"),
    [
        ("none", "vllm", "it ignores prompt_logprobs"),
        ("echo", "vllm", "it ignores prompt_logprobs"),
        ("none", "echo", "it gives no top_logprobs"),
        ("echo_by_text", "echo", "it names tokens by their text"),
        ("vllm", "sglang", r"status 404 \(Not Found\). Check the url's path"),
        ("sglang", "vllm", r"status 404 \(Not Found\). Check the url's path"),
    ],
)
def test_unsuitable_servers_raise_before_the_training(speaks: str, api: str, message: str) -> None:
    with serving(m.teacher_of(NAME), WORDS, speaks=speaks) as server, pytest.raises(TeacherError, match=message):
        distiller_of(served(server, api=api))


def test_a_limit_of_the_server_raises(server: CompletionsServer) -> None:
    server.longest_list = 5
    with pytest.raises(TeacherError, match=r"status 400 \(Requested prompt logprobs of 6, .* --max-logprobs"):
        distiller_of(served(server))
    assert len(server.asked) == 1  # a rejection is not retried


# Failures.


@pytest.mark.parametrize("fault", [500, 503, 429, "drop", "cut", "slow", "trickle"])
def test_a_temporary_failure_changes_nothing(server: CompletionsServer, fault: Any) -> None:
    distiller, batch = distiller_of(served(server, retries=2, timeout_s=0.5)), batch_of()
    expected = distiller.teacher_signals(batch).sparse
    server.faults, asked = [fault, fault], len(server.asked)
    found = distiller.teacher_signals(batch).sparse
    assert len(server.asked) == asked + 3
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.log_probabilities, expected.log_probabilities, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, r"failed 2 times in a row, the last time with status 500"),
        ("drop", r"the last time with a connection that failed \(RemoteDisconnected\)"),
        ("cut", r"the last time with a connection that failed \(IncompleteRead\)"),
        ("slow", r"the last time with no answer within timeout_s=0.3"),
        (401, r"refused: status 401 .*api_key_env"),
        (307, r"refused: status 307 .*It redirects, which is not followed"),
    ],
)
def test_a_permanent_failure_raises_without_secrets(
    server: CompletionsServer,
    fault: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TEACHER_KEY", SECRET)
    teacher = served(server, timeout_s=0.3, api_key_env="TEACHER_KEY")
    distiller, batch = distiller_of(teacher), batch_of()
    server.faults, asked = [fault] * 4, len(server.asked)
    with caplog.at_level(logging.DEBUG), pytest.raises(TeacherError, match=message) as caught:
        distiller.teacher_signals(batch)
    assert server.asked[-1][1]["Authorization"] == f"Bearer {SECRET}"
    assert len(server.asked) - asked == (1 if fault in (401, 307) else 2)
    for text in ("".join(traceback.format_exception(caught.value)), caplog.text, repr(teacher)):
        assert SECRET not in text and "127.0.0.1" not in text and str(server.port) not in text
    chain: BaseException | None = caught.value
    while chain is not None:
        assert SECRET not in str(chain) and str(server.port) not in str(chain)
        chain = chain.__cause__ or chain.__context__


def test_an_unreachable_server_raises() -> None:
    with serving(m.teacher_of(NAME), WORDS) as server:
        teacher = served(server)
    with pytest.raises(TeacherError, match=r"failed 2 times in a row, .*\(ConnectionRefusedError\)"):
        distiller_of(teacher)


def test_no_requests_follow_a_failure(server: CompletionsServer) -> None:
    distiller, batch = distiller_of(served(server, batch_size=1, max_concurrency=1, retries=0)), batch_of(count=8)
    server.faults, asked = [400], len(server.asked)
    with pytest.raises(TeacherError, match="status 400"):
        distiller.teacher_signals(batch)
    assert len(server.asked) - asked <= 2  # the failed request, and at most one already started


@pytest.mark.parametrize("wait", ["7", "soon", "-1", None])
def test_retry_after_is_used_only_as_seconds(wait: str | None) -> None:
    assert endpoint._seconds(wait) == (7.0 if wait == "7" else None)


# Settings.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"api": "tgi"}, "api='tgi': allowed are vllm, sglang, echo"),
        ({"top_logprobs": 0}, "top_logprobs=0: must be a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size=1.5: must be a whole number"),
        ({"max_concurrency": True}, "max_concurrency=True: must be a whole number"),
        ({"retries": -1}, "retries=-1: must be a whole number of at least 0"),
        ({"timeout_s": 0}, "timeout_s=0: must be a number of seconds above 0"),
        ({"processing_class": "gpt2"}, "processing_class is a str: give the tokenizer of the served model"),
    ],
)
def test_invalid_settings_raise(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        ServedTeacher("http://localhost:1/v1", "large", **{"processing_class": WORDS, **changed})


@pytest.mark.parametrize(
    "url",
    [
        f"http://me:{SECRET}@host/v1",
        f"https://host/v1?key={SECRET}",
        f"https://host/v1#{SECRET}",
        f"ftp://{SECRET}",
        f"http://host:{SECRET}/",
        SECRET,
        "",
    ],
)
def test_an_invalid_address_is_not_repeated_in_the_error(url: str) -> None:
    with pytest.raises(SettingError, match="url") as caught:
        ServedTeacher(url, "large", processing_class=WORDS)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("held", [None, "", "two\nlines", "schlüssel"])
def test_a_missing_or_invalid_key_raises(held: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    if held is not None:
        monkeypatch.setenv("TEACHER_KEY", held)
    with pytest.raises(SettingError, match="the environment variable that api_key_env names") as caught:
        ServedTeacher("https://host/v1", "large", processing_class=WORDS, api_key_env="TEACHER_KEY")
    assert not held or held not in str(caught.value)
    with pytest.raises(SettingError, match="Do not pass the key itself") as caught:
        ServedTeacher("https://host/v1", "large", processing_class=WORDS, api_key_env=SECRET)
    assert SECRET not in str(caught.value)


def test_a_key_over_plain_http_gives_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEACHER_KEY", SECRET)
    with caplog.at_level(logging.WARNING):
        ServedTeacher("http://far.example/v1", "large", processing_class=WORDS, api_key_env="TEACHER_KEY")
    assert "unencrypted" in caplog.text and "far.example" not in caplog.text and SECRET not in caplog.text


def test_it_cannot_be_copied_or_pickled(server: CompletionsServer) -> None:
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(SettingError, match="neither copied nor pickled"):
            attempt(served(server))
