"""A real HTTP server on loopback that scores prompts with a tiny model, like vLLM, SGLang and plain completions.

It can be made to fail: each request takes one fault from `faults` until none is left.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Top = list[tuple[int, float]]


class CompletionsServer:
    """Attributes:
    speaks: "vllm", "sglang", "echo", "echo_by_text" or "none" (no log-probabilities of prompts).
    faults: faults of the next replies: "slow", "trickle", "drop", "cut", a status, or a function of the reply.
    asked: every request: path, headers, body. most_at_once: maximum number of concurrent requests.
    """

    def __init__(self, model: Any, tokenizer: Any, *, speaks: str = "vllm", longest_list: int = 10_000) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.speaks, self.longest_list = speaks, longest_list
        self.faults: list[str | int | Callable[[Any], Any]] = []
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.most_at_once = self._at_once = 0
        self.pause_s = 0.0
        self._lock, self._scoring = threading.Lock(), threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        threading.Thread(target=lambda: self._http.serve_forever(poll_interval=0.01), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}" + ("" if self.speaks == "sglang" else "/v1")

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    # One request.

    def take(self, path: str, headers: dict[str, str], body: Any) -> str | int | Callable[[Any], Any] | None:
        with self._lock:
            self.asked.append((path, headers, body))
            return self.faults.pop(0) if self.faults else None

    def reply(self, path: str, body: Any) -> tuple[int, Any]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self.pause_s)
        with self._lock:
            self._at_once -= 1
        if path != ("/generate" if self.speaks == "sglang" else "/v1/completions"):
            return 404, {"detail": "Not Found"}
        k = body.get("prompt_logprobs", body.get("logprobs", body.get("top_logprobs_num")))
        if k > self.longest_list:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.longest_list}"
            return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
        prompts = body["input_ids"] if self.speaks == "sglang" else body["prompt"]
        answers = [self._answer(prompt, k) for prompt in prompts]
        if self.speaks == "sglang":
            return 200, answers
        return 200, {"choices": [{"index": i, "text": "w1", **one} for i, one in enumerate(answers)]}

    def _answer(self, prompt: list[int], k: int) -> dict[str, Any]:
        with self._scoring, torch.no_grad():
            log_p = self.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        tops = [list(zip(row.topk(k).indices.tolist(), row.topk(k).values.tolist(), strict=True)) for row in log_p]
        own = [row[token].item() for row, token in zip(log_p, prompt[1:], strict=False)]
        return _FORMS[self.speaks](self, prompt, tops, own)

    def text(self, token: int) -> str:
        return self.tokenizer.decode([token])


def _vllm(server: CompletionsServer, prompt: list[int], tops: list[Top], own: list[float]) -> dict[str, Any]:
    rows = []
    for top, token, value in zip(tops, prompt[1:], own, strict=False):
        listed = {**dict(top), token: value}
        rows.append({str(i): {"logprob": p, "rank": 1, "decoded_token": server.text(i)} for i, p in listed.items()})
    return {"prompt_logprobs": [None, *rows], "logprobs": None}


def _sglang(server: CompletionsServer, prompt: list[int], tops: list[Top], own: list[float]) -> dict[str, Any]:
    scored = zip([None, *own], prompt, strict=True)
    return {
        "text": "w1",
        "meta_info": {
            "input_token_logprobs": [[value, token, server.text(token)] for value, token in scored],
            "input_top_logprobs": [None, *([[p, i, server.text(i)] for i, p in top] for top in tops[:-1])],
        },
    }


def _echo(server: CompletionsServer, prompt: list[int], tops: list[Top], own: list[float]) -> dict[str, Any]:
    by_text = server.speaks == "echo_by_text"
    name = server.text if by_text else "token_id:{}".format
    rows = [{**{name(i): p for i, p in top}, name(t): v} for top, t, v in zip(tops, prompt[1:], own, strict=False)]
    echoed = [*prompt, tops[-1][0][0]]  # and the generated token
    tops_of = [None, *rows, {name(i): p for i, p in tops[-1]}]
    return {"logprobs": {"tokens": [name(t) for t in echoed], "top_logprobs": tops_of}, "prompt_logprobs": None}


def _none(server: CompletionsServer, prompt: list[int], tops: list[Top], own: list[float]) -> dict[str, Any]:
    return {"logprobs": None}


_FORMS = {"vllm": _vllm, "sglang": _sglang, "echo": _echo, "echo_by_text": _echo, "none": _none}


def _handler(server: CompletionsServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, as with real servers

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = server.take(self.path, dict(self.headers), body)
            try:
                self._respond(fault, body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up

        def _respond(self, fault: Any, body: Any) -> None:
            if fault == "drop":
                self.close_connection = True
                return
            status, reply = server.reply(self.path, body)
            if isinstance(fault, int):
                status, reply = fault, {"error": {"message": f"at {server.url}: {self.headers.get('Authorization')}"}}
            if callable(fault):
                reply = fault(reply)
            text = json.dumps(reply).encode()
            if fault == "slow":
                time.sleep(0.6)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if fault == "trickle":
                for start in range(0, len(text), len(text) // 12):
                    self.wfile.write(text[start : start + len(text) // 12])
                    time.sleep(0.1)
            else:
                self.wfile.write(text[: len(text) // 2] if fault == "cut" else text)
            self.close_connection = fault == "cut"

        def log_message(self, *parts: Any) -> None:
            """Log nothing."""

    return Handler


@contextmanager
def serving(model: Any, tokenizer: Any, **settings: Any) -> Iterator[CompletionsServer]:
    server = CompletionsServer(model, tokenizer, **settings)
    try:
        yield server
    finally:
        server.close()
