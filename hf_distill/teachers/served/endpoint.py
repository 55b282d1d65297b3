"""Asking a server: JSON over HTTP, with retries. What it says of a failure names neither address nor key.

The connection is direct: no redirect is followed and no proxy used, so the key goes to that host and nowhere else.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import random
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from hf_distill.errors import SettingError, TeacherError

logger = logging.getLogger(__name__)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # may be gone the next time
_jitter = random.Random()  # its own, so that the training's random numbers stay as they were


@dataclass(frozen=True)
class _Answer:
    status: int
    retry_after_s: float | None
    text: str


class Endpoint:
    """A server that takes JSON. It can be neither printed nor pickled with its address.

    Args:
        url: http(s)://host[:port][/path], without user, password, query.
        timeout_s: of one attempt. retries: further attempts after a failure that may pass.
        api_key_env: name of the environment variable with the key, read at each request; None: no key.

    Raises:
        SettingError: none of these; what came is not repeated, since it may hold a key.
    """

    def __init__(self, url: str, *, timeout_s: float, retries: int, api_key_env: str | None) -> None:
        self._secure, self._host, self._port, self._path = _parts(url)
        if api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", api_key_env):
            raise SettingError(
                "api_key_env is the name of an environment variable that holds the key, like TEACHER_API_KEY, and what "
                "was given is no such name. Do not pass the key itself."
            )
        self._timeout_s, self._retries, self._key_name = timeout_s, retries, api_key_env
        if self._key() is not None and not self._secure and self._host not in ("localhost", "127.0.0.1", "::1"):
            logger.warning("The teacher's server is asked over http: its key and the texts travel unencrypted.")

    def __reduce__(self) -> Any:
        raise SettingError("a served teacher holds an address, so it is neither copied nor pickled. Make it anew.")

    def post(self, path: str, body: Any) -> Any:
        """The answer to `body`, parsed.

        Raises:
            TeacherError: every attempt failed, or the server refused.
        """
        payload, problem = json.dumps(body).encode(), ""
        for attempt in range(self._retries + 1):
            answer, problem = self._once(path, payload)
            if answer is not None and not problem:
                try:
                    return json.loads(answer.text)
                except ValueError:
                    problem = "an answer that is no JSON, or was cut off"
            if answer is not None and answer.status not in (200, *_PASSING):
                raise TeacherError(f"the teacher's server refused: {problem}. {_advice(answer.status)}")
            if attempt < self._retries:
                self._wait(attempt, None if answer is None else answer.retry_after_s, problem)
        raise TeacherError(
            f"the teacher's server failed {self._retries + 1} times in a row, the last time with {problem}. Look at "
            "its log; raise timeout_s= or retries=, or ask less at once with batch_size= and max_concurrency=."
        )

    def scrubbed(self, text: str) -> str:
        """What a server said, without this address and key, and not longer than a line or two."""
        text = " ".join(text.split())
        text = text.replace(self._key() or "\0", "…")
        text = re.sub(r"https?://\S+", "…", text)
        text = re.sub(rf"(?<![\w.-]){re.escape(self._host)}(:\d+)?(?![\w-])", "…", text, flags=re.IGNORECASE)
        return text if len(text) <= 300 else text[:299] + "…"

    def _once(self, path: str, payload: bytes) -> tuple[_Answer | None, str]:
        """An answer, and what is wrong with it ("": nothing); None where none came."""
        try:
            answer = self._exchange(path, payload)
        except TimeoutError:
            return None, f"no answer within timeout_s={self._timeout_s:g}"
        except (OSError, http.client.HTTPException) as error:
            return None, f"a connection that failed ({type(error).__name__})"  # its text may name the host
        if answer.status == 200:
            return answer, ""
        said = self.scrubbed(_message(answer.text))
        return answer, f"status {answer.status}" + (f" ({said})" if said else "")

    def _exchange(self, path: str, payload: bytes) -> _Answer:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        deadline = time.monotonic() + self._timeout_s
        connection = kind(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request("POST", self._path + path, payload, self._headers())
            socket = connection.sock
            response = connection.getresponse()
            announced, parts = response.length, [b""]  # None: until it closes, or in chunks
            while announced is None or sum(map(len, parts)) < announced:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                socket.settimeout(left)  # a server that trickles must end too
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
            raise SettingError(
                "the environment variable that api_key_env names is not set, is empty, or holds characters that no key "
                "has. Export it before the training starts."
            )
        return key

    def _wait(self, attempt: int, asked_s: float | None, problem: str) -> None:
        wait = FIRST_WAIT_S * 2**attempt * _jitter.uniform(0.5, 1)
        wait = min(LONGEST_WAIT_S, wait if asked_s is None else max(wait, asked_s))
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
        raise SettingError(
            "url holds a user, a password or a query. Give the plain address; a key goes into an environment variable, "
            "whose name is api_key_env."
        )
    secure = parts.scheme == "https"
    return secure, parts.hostname, port or (443 if secure else 80), parts.path.rstrip("/")


def _message(text: str) -> str:
    """What stands in an error's body, in the forms of OpenAI, vLLM and FastAPI."""
    try:
        found = json.loads(text)
    except ValueError:
        return "" if text.lstrip().startswith("<") else text  # a page of a proxy
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found)


def _seconds(header: str | None) -> float | None:
    return float(header) if header is not None and re.fullmatch(r"\d+(\.\d+)?", header) else None


def _advice(status: int) -> str:
    if status in (401, 403):
        return "Set api_key_env to the name of the environment variable that holds a key which it accepts."
    if status in (404, 405):
        return "Check the url's path, and that model= is a name that it serves."
    if 300 <= status < 400:
        return "It redirects, which is not followed, because of the key. Give the address it redirects to."
    return (
        "A limit on log-probabilities is raised at the server (vLLM: --max-logprobs), or top_logprobs= is lowered; an "
        "input that is too long is cut where the dataset is tokenized."
    )
