"""Requests for the log-probabilities of prompts, to three kinds of servers, and how to read their replies.

Only log-probabilities by token id are read: texts of tokens are not unique.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from hf_distill._types import Keywords
from hf_distill.errors import SettingError, TeacherError

Tokens: TypeAlias = Sequence[int]
Row: TypeAlias = Mapping[int, float]  # token id → log-probability, of the tokens that were returned for one position
Json: TypeAlias = Any  # parsed, and not checked yet


@dataclass(frozen=True)
class Api:
    """One kind of server.

    Attributes:
        path: the endpoint's path under the url.
        body: (model, prompts, k) → the request.
        answers: reply → one answer for each prompt, in order.
        rows: (answer, prompt) → a row for each position but the first.
        texts: answer → the text of each token id, where the server returns it.
    """

    path: str
    body: Callable[[str, Sequence[Tokens], int], Keywords]
    answers: Callable[[Json], list[Json]]
    rows: Callable[[Json, Tokens], list[Row]]
    texts: Callable[[Json], dict[int, str]]


def _unreadable(reason: str) -> TeacherError:
    return TeacherError(
        f"the teacher's server gave no log-probabilities of the prompts that could be read: {reason}. Check api=: "
        '"vllm" for vLLM\'s prompt_logprobs, "sglang" for SGLang\'s /generate, "echo" for completions with echo that '
        "name tokens as token_id:N. llama.cpp and TGI do not return the most likely tokens of a prompt by id."
    )


def read(api: Api, reply: Json, prompts: Sequence[Tokens]) -> list[list[Row]]:
    """Return the rows of every prompt, `[prompts][positions - 1]`.

    Raises:
        TeacherError: if the reply has another form, is incomplete, or is about other tokens.
    """
    try:
        answers = api.answers(reply)
        if len(answers) != len(prompts):
            raise _unreadable(f"it answered {len(answers)} of {len(prompts)} prompts")
        found = [api.rows(answer, prompt) for answer, prompt in zip(answers, prompts, strict=True)]
        for rows, prompt in zip(found, prompts, strict=True):
            if len(rows) != len(prompt) - 1:
                raise _unreadable(f"it returned {len(rows)} of {len(prompt) - 1} positions of a prompt")
        return found
    except TeacherError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise TeacherError(
            f"the teacher's server gave an answer of another form ({type(error).__name__}). Check api= and url=."
        ) from None


def _in_order(reply: Json) -> list[Json]:
    return sorted(reply["choices"], key=lambda choice: int(choice["index"]))


def _check_same_token(sent: int, scored: int, position: int) -> None:
    if sent != scored:
        raise _unreadable(f"token {position} of a prompt was {sent}, and it scored {scored}: it has another tokenizer")


# vLLM: completions with `prompt_logprobs`. Neutral settings, where its generation config may have others.

_PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


def _vllm_body(model: str, prompts: Sequence[Tokens], k: int) -> Keywords:
    return {"model": model, "prompt": list(map(list, prompts)), "max_tokens": 1, "prompt_logprobs": k, **_PLAIN}


def _vllm_rows(answer: Json, prompt: Tokens) -> list[Row]:
    scores = answer.get("prompt_logprobs")
    if scores is None:
        raise _unreadable("it ignores prompt_logprobs")
    rows: list[Row] = [{int(token): float(entry["logprob"]) for token, entry in row.items()} for row in scores[1:]]
    for position, (row, given) in enumerate(zip(rows, prompt[1:], strict=False), 1):
        if given not in row:  # vLLM always returns the prompt's own token
            raise _unreadable(f"token {position} of a prompt was {given}, which it does not score")
    return rows


def _vllm_texts(answer: Json) -> dict[int, str]:
    rows = [row for row in answer["prompt_logprobs"] if row]
    return {int(i): e["decoded_token"] for row in rows for i, e in row.items() if e.get("decoded_token") is not None}


# SGLang: its own /generate, since its completions name tokens by their text.


def _sglang_body(model: str, prompts: Sequence[Tokens], k: int) -> Keywords:
    return {
        "input_ids": list(map(list, prompts)),
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": k,
        "return_text_in_logprobs": True,
    }


def _sglang_rows(answer: Json, prompt: Tokens) -> list[Row]:
    scores = answer["meta_info"]
    if scores.get("input_top_logprobs") is None:
        raise _unreadable("it gives no input_top_logprobs")
    rows: list[dict[int, float]] = [
        {int(token): float(value) for value, token, *_ in row} for row in scores["input_top_logprobs"][1:]
    ]
    for position, (row, own) in enumerate(zip(rows, scores["input_token_logprobs"][1:], strict=False), 1):
        if position < len(prompt):
            _check_same_token(prompt[position], own[1], position)
        row.setdefault(int(own[1]), float(own[0]))
    return list(rows)


def _sglang_texts(answer: Json) -> dict[int, str]:
    rows = [row for row in answer["meta_info"]["input_top_logprobs"] if row]
    return {int(token): text[0] for row in rows for _, token, *text in row if text and text[0] is not None}


# Completions with `echo`, as OpenAI's were, from a server that can name tokens by id.


def _echo_body(model: str, prompts: Sequence[Tokens], k: int) -> Keywords:
    options = {"echo": True, "logprobs": k, "max_tokens": 1, "return_tokens_as_token_ids": True}
    return {"model": model, "prompt": list(map(list, prompts)), "temperature": 1.0, "top_p": 1.0, **options}


def _echo_rows(answer: Json, prompt: Tokens) -> list[Row]:
    scores = answer.get("logprobs")
    if scores is None or scores.get("top_logprobs") is None:
        raise _unreadable("it gives no top_logprobs")
    tokens, tops = scores["tokens"][: len(prompt)], scores["top_logprobs"][: len(prompt)]
    if len(tokens) < len(prompt):
        raise _unreadable(f"it echoes {len(tokens)} of {len(prompt)} tokens")
    for position, (token, given) in enumerate(zip(tokens, prompt, strict=True)):
        _check_same_token(given, _by_id(token), position)
    return [{_by_id(token): float(value) for token, value in row.items()} for row in tops[1:]]


def _by_id(token: str) -> int:
    start, _, number = token.partition(":")
    if start != "token_id" or not number.isdecimal():
        raise _unreadable("it names tokens by their text, which is not unique, and not as token_id:N")
    return int(number)


APIS = {
    "vllm": Api("/completions", _vllm_body, _in_order, _vllm_rows, _vllm_texts),
    "sglang": Api("/generate", _sglang_body, lambda r: r if isinstance(r, list) else [r], _sglang_rows, _sglang_texts),
    "echo": Api("/completions", _echo_body, _in_order, _echo_rows, lambda answer: {}),
}


logger = logging.getLogger(__name__)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_jitter = random.Random()  # separate from the training's random numbers


@dataclass(frozen=True)
class _Answer:
    status: int
    retry_after_s: float | None
    text: str


class Endpoint:
    """A server that takes JSON. Its address is neither printed nor pickled.

    Args:
        url: http(s)://host[:port][/path], without user, password or query.
        timeout_s: the timeout of one attempt.
        retries: further attempts after a temporary failure.
        api_key_env: the environment variable with the key, read at each request; None for no key.

    Raises:
        SettingError: if a value is not allowed. The message does not repeat it, since it may hold a key.
    """

    def __init__(self, url: str, *, timeout_s: float, retries: int, api_key_env: str | None) -> None:
        self._secure, self._host, self._port, self._path = _parts(url)
        if api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", api_key_env):
            raise SettingError("api_key_env is the name of an environment variable. Do not pass the key itself.")
        self._timeout_s, self._retries, self._key_name = timeout_s, retries, api_key_env
        if self._key() is not None and not self._secure and self._host not in ("localhost", "127.0.0.1", "::1"):
            logger.warning("The teacher's server is reached over http: its key and the texts travel unencrypted.")

    def __reduce__(self) -> str:
        raise SettingError("a served teacher holds an address, so it is neither copied nor pickled. Make another one.")

    def post(self, path: str, body: Keywords) -> Json:
        """Return the parsed reply to `body`.

        Raises:
            TeacherError: if every attempt failed, or the server refused.
        """
        payload, problem = json.dumps(body).encode(), ""
        for attempt in range(self._retries + 1):
            answer, problem = self._once(path, payload)
            if answer is not None and not problem:
                try:
                    return json.loads(answer.text)
                except ValueError:
                    problem = "an answer that is no JSON, or was cut off"
            if answer is not None and answer.status not in (200, *_TEMPORARY):
                raise TeacherError(f"the teacher's server refused: {problem}. {_advice(answer.status)}")
            if attempt < self._retries:
                self._wait(attempt, None if answer is None else answer.retry_after_s, problem)
        raise TeacherError(
            f"the teacher's server failed {self._retries + 1} times in a row, the last time with {problem}. Look at "
            "its log; raise timeout_s= or retries=, or lower batch_size= or max_concurrency=."
        )

    def _scrub(self, text: str) -> str:
        """Return a server's text without this address and key, shortened to 300 characters."""
        text = " ".join(text.split())
        text = text.replace(self._key() or "\0", "…")
        text = re.sub(r"https?://\S+", "…", text)
        text = re.sub(rf"(?<![\w.-]){re.escape(self._host)}(:\d+)?(?![\w-])", "…", text, flags=re.IGNORECASE)
        return text if len(text) <= 300 else text[:299] + "…"

    def _once(self, path: str, payload: bytes) -> tuple[_Answer | None, str]:
        """Return an answer (or None) and the problem with it (or "")."""
        try:
            answer = self._exchange(path, payload)
        except TimeoutError:
            return None, f"no answer within timeout_s={self._timeout_s:g}"
        except (OSError, http.client.HTTPException) as error:
            return None, f"a connection that failed ({type(error).__name__})"  # its text may name the host
        if answer.status == 200:
            return answer, ""
        message = self._scrub(_message(answer.text))
        return answer, f"status {answer.status}" + (f" ({message})" if message else "")

    def _exchange(self, path: str, payload: bytes) -> _Answer:
        connection_class = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        deadline = time.monotonic() + self._timeout_s
        connection = connection_class(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request("POST", self._path + path, payload, self._headers())
            socket = connection.sock
            response = connection.getresponse()
            announced, parts = response.length, [b""]  # None if it ends when the connection closes, or in chunks
            while announced is None or sum(map(len, parts)) < announced:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                socket.settimeout(left)  # also for a server that sends a byte at a time
                parts.append(response.read1(1 << 20))
                if not parts[-1]:
                    break
            if announced is not None and sum(map(len, parts)) < announced:
                raise http.client.IncompleteRead(b"")
            text = b"".join(parts).decode("utf-8", errors="replace")
            return _Answer(response.status, _seconds(response.getheader("Retry-After")), text)
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        key = self._key()
        return {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})

    def _key(self) -> str | None:
        if self._key_name is None:
            return None
        key = os.environ.get(self._key_name, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise SettingError("the environment variable that api_key_env names is not set or no key. Export it.")
        return key

    def _wait(self, attempt: int, retry_after_s: float | None, problem: str) -> None:
        wait = FIRST_WAIT_S * 2**attempt * _jitter.uniform(0.5, 1)
        wait = min(LONGEST_WAIT_S, wait if retry_after_s is None else max(wait, retry_after_s))
        logger.warning(
            f"The teacher's server: {problem}. Attempt {attempt + 2} of {self._retries + 1} in {wait:.1f} s."
        )
        time.sleep(wait)


def _parts(url: str) -> tuple[bool, str, int, str]:
    try:
        parts = urlsplit(str(url))
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingError("url: give the server's address as http://host:port/v1 or https://host/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise SettingError("url holds a user, a password or a query. Give the plain address, and a key by api_key_env.")
    secure = parts.scheme == "https"
    return secure, parts.hostname, port or (443 if secure else 80), parts.path.rstrip("/")


def _message(text: str) -> str:
    """Return the message in an error's body, in the forms of OpenAI, vLLM and FastAPI."""
    try:
        found = json.loads(text)
    except ValueError:
        return "" if text.lstrip().startswith("<") else text  # a proxy's HTML page
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found)


def _seconds(header: str | None) -> float | None:
    return float(header) if header is not None and re.fullmatch(r"\d+(\.\d+)?", header) else None


def _advice(status: int) -> str:
    if status in (401, 403):
        return "Set api_key_env to the name of the environment variable that holds a valid key."
    if status in (404, 405):
        return "Check the url's path, and that it serves model=."
    if 300 <= status < 400:
        return "It redirects, which is not followed because of the key. Give the address it redirects to."
    return (
        "If it limits log-probabilities, raise the limit (vLLM: --max-logprobs) or lower top_logprobs=; if an input is "
        "too long, truncate it when the dataset is tokenized."
    )
