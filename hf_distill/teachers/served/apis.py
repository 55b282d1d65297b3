"""How three kinds of servers are asked for the log-probabilities of prompts, and where their answers keep them.

Only what names tokens by id is read: texts of tokens are not unique, so log-probabilities by text are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_distill.errors import TeacherError

Tokens = Sequence[int]
Row = Mapping[int, float]  # token id → log-probability, of those listed at one position


@dataclass(frozen=True)
class Api:
    """One kind of server.

    Attributes:
        path: under the url. body: model, prompts, k → the request.
        answers: the reply → one answer a prompt, in order.
        rows: answer, prompt → for each position but the first, what is listed for it.
        texts: answer → token id → its text, as far as it is told.
    """

    path: str
    body: Callable[[str, Sequence[Tokens], int], dict[str, Any]]
    answers: Callable[[Any], list[Any]]
    rows: Callable[[Any, Tokens], list[Row]]
    texts: Callable[[Any], dict[int, str]]


def unreadable(why: str) -> TeacherError:
    return TeacherError(
        f"the teacher's server gave no log-probabilities of the prompts that could be read: {why}. Check api=: "
        'it is "vllm" for vLLM\'s prompt_logprobs, "sglang" for SGLang\'s /generate, "echo" for completions with echo '
        "that name tokens as token_id:N. llama.cpp and TGI do not give the likeliest tokens of a prompt by id."
    )


def read(api: Api, reply: Any, prompts: Sequence[Tokens]) -> list[list[Row]]:
    """The rows of every prompt, `[prompts][positions - 1]`.

    Raises:
        TeacherError: an answer that is not of this form, tells less than was asked for, or is of other tokens.
    """
    try:
        answers = api.answers(reply)
        if len(answers) != len(prompts):
            raise unreadable(f"it answered {len(answers)} of {len(prompts)} prompts")
        return [_rows(api, answer, prompt) for answer, prompt in zip(answers, prompts, strict=True)]
    except TeacherError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise TeacherError(
            f"the teacher's server gave an answer of another form ({type(error).__name__}). Check api= and url=."
        ) from None


def _rows(api: Api, answer: Any, prompt: Tokens) -> list[Row]:
    rows = api.rows(answer, prompt)
    if len(rows) != len(prompt) - 1:
        raise unreadable(f"it tells {len(rows)} of {len(prompt) - 1} positions of a prompt")
    return rows


def _in_order(reply: Any) -> list[Any]:
    return sorted(reply["choices"], key=lambda choice: int(choice["index"]))


def _same_token(given: int, told: int, position: int) -> None:
    if given != told:
        raise unreadable(f"token {position} of a prompt was {given}, and it scored {told}: it has another tokenizer")


# vLLM: completions with `prompt_logprobs`. Neutral settings, where its generation config may have others.

_PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


def _vllm_body(model: str, prompts: Sequence[Tokens], k: int) -> dict[str, Any]:
    return {"model": model, "prompt": list(map(list, prompts)), "max_tokens": 1, "prompt_logprobs": k, **_PLAIN}


def _vllm_rows(answer: Any, prompt: Tokens) -> list[Row]:
    told = answer.get("prompt_logprobs")
    if told is None:
        raise unreadable("it ignores prompt_logprobs")
    rows: list[Row] = [{int(token): float(entry["logprob"]) for token, entry in row.items()} for row in told[1:]]
    for position, (row, given) in enumerate(zip(rows, prompt[1:], strict=False), 1):
        if given not in row:  # it always tells the token that stands there, likely or not
            raise unreadable(f"token {position} of a prompt was {given}, which it does not tell of")
    return rows


def _vllm_texts(answer: Any) -> dict[int, str]:
    rows = [row for row in answer["prompt_logprobs"] if row]
    return {int(i): e["decoded_token"] for row in rows for i, e in row.items() if e.get("decoded_token") is not None}


# SGLang: its own /generate; its completions name tokens by their text.


def _sglang_body(model: str, prompts: Sequence[Tokens], k: int) -> dict[str, Any]:
    return {
        "input_ids": list(map(list, prompts)),
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": k,
        "return_text_in_logprobs": True,
    }


def _sglang_rows(answer: Any, prompt: Tokens) -> list[Row]:
    told = answer["meta_info"]
    if told.get("input_top_logprobs") is None:
        raise unreadable("it gives no input_top_logprobs")
    rows: list[dict[int, float]] = [
        {int(token): float(value) for value, token, *_ in row} for row in told["input_top_logprobs"][1:]
    ]
    for position, (row, own) in enumerate(zip(rows, told["input_token_logprobs"][1:], strict=False), 1):
        if position < len(prompt):
            _same_token(prompt[position], own[1], position)
        row.setdefault(int(own[1]), float(own[0]))
    return list(rows)


def _sglang_texts(answer: Any) -> dict[int, str]:
    rows = [row for row in answer["meta_info"]["input_top_logprobs"] if row]
    return {int(token): text[0] for row in rows for _, token, *text in row if text and text[0] is not None}


# Completions with `echo`, as OpenAI's were, of a server that can name tokens by id.


def _echo_body(model: str, prompts: Sequence[Tokens], k: int) -> dict[str, Any]:
    asked = {"echo": True, "logprobs": k, "max_tokens": 1, "return_tokens_as_token_ids": True}
    return {"model": model, "prompt": list(map(list, prompts)), "temperature": 1.0, "top_p": 1.0, **asked}


def _echo_rows(answer: Any, prompt: Tokens) -> list[Row]:
    told = answer.get("logprobs")
    if told is None or told.get("top_logprobs") is None:
        raise unreadable("it gives no top_logprobs")
    tokens, tops = told["tokens"][: len(prompt)], told["top_logprobs"][: len(prompt)]
    if len(tokens) < len(prompt):
        raise unreadable(f"it echoes {len(tokens)} of {len(prompt)} tokens")
    for position, (token, given) in enumerate(zip(tokens, prompt, strict=True)):
        _same_token(given, _by_id(token), position)
    return [{_by_id(token): float(value) for token, value in row.items()} for row in tops[1:]]


def _by_id(token: str) -> int:
    start, _, number = token.partition(":")
    if start != "token_id" or not number.isdecimal():
        raise unreadable("it names tokens by their text, which is not unique, and not as token_id:N")
    return int(number)


APIS = {
    "vllm": Api("/completions", _vllm_body, _in_order, _vllm_rows, _vllm_texts),
    "sglang": Api("/generate", _sglang_body, lambda r: r if isinstance(r, list) else [r], _sglang_rows, _sglang_texts),
    "echo": Api("/completions", _echo_body, _in_order, _echo_rows, lambda answer: {}),
}
