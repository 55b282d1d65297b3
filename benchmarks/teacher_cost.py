"""What a cached teacher costs beside a live one and beside none: time, bytes, the error of the gradient. No accuracy.

Time: collation (where the cache is looked up), forward passes, loss, backward and optimizer; one step a way in turns,
so that a machine that is busy for a while slows all of them; processor time, on CUDA the wall clock. Weights are
random: neither time nor bytes asks for better ones. The gradient's error stands in `gradient_error.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when run as a script

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from benchmarks.gradient_error import gradient_errors, plot
from hf_distill import CachedTeacher, Distiller, TeacherCache
from hf_distill.teachers import Dense, Hybrid, Sampled, TopK

NO_TEACHER, CACHED, LIVE = "no teacher", "cached teacher", "live teacher"
# What is kept of a large vocabulary, and which of them are trained with.
STORES = {"TopK(64)": TopK(64), "Sampled(32)": Sampled(32), "Hybrid(32, 32)": Hybrid(32, 32), "Dense()": Dense()}
TRAINED = ("TopK(64)", "Sampled(32)")
LOOK_UPS = 3  # of the whole cache
Example = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Both models, the examples and their collator."""

    student: Any
    teacher: Any
    examples: list[Example]
    collate: Callable[[list[Example]], dict[str, Tensor]]
    temperature: float


def padded(examples: list[Example]) -> dict[str, Tensor]:
    """Ids and mask to the longest; a label an example, or for each token."""
    longest = max(len(one["input_ids"]) for one in examples)
    rows: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for one in examples:
        missing = longest - len(one["input_ids"])
        rows["input_ids"].append(one["input_ids"] + [0] * missing)
        rows["attention_mask"].append([1] * len(one["input_ids"]) + [0] * missing)
        rows["labels"].append(one["labels"] if isinstance(one["labels"], int) else one["labels"] + [-100] * missing)
    return {name: torch.tensor(values) for name, values in rows.items()}


def made_examples(options: argparse.Namespace, vocabulary: int, *, of_tokens: bool) -> list[Example]:
    """Between half the length and all of it."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(options.batch * options.batches):
        length = int(torch.randint(options.length // 2, options.length + 1, (1,), generator=generator))
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": ids if of_tokens else index % 2})
    return made


def classifier(options: argparse.Namespace) -> Setting:
    torch.manual_seed(0)

    def bert(layers: int, width: int) -> Any:
        sizes = {"hidden_size": width, "num_attention_heads": max(1, width // 64), "intermediate_size": 4 * width}
        longest = {"max_position_embeddings": options.length, "vocab_size": 1000}
        return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes, **longest))

    student, teacher = bert(options.student[0], options.student[1]), bert(options.teacher[0], options.teacher[1])
    return Setting(student.train(), teacher.eval(), made_examples(options, 1000, of_tokens=False), padded, 2.0)


def language_model(options: argparse.Namespace) -> Setting:
    torch.manual_seed(0)

    def llama(layers: int, width: int) -> Any:
        sizes = {"hidden_size": width, "num_attention_heads": max(1, width // 64), "intermediate_size": 4 * width}
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, vocab_size=options.vocabulary, **sizes))

    student, teacher = llama(options.student[0], options.student[1]), llama(options.teacher[0], options.teacher[1])
    examples = made_examples(options, options.vocabulary, of_tokens=True)
    return Setting(student.train(), teacher.eval(), examples, padded, 1.0)


def built(setting: Setting, folder: Path, store: Any, options: argparse.Namespace) -> tuple[CachedTeacher, float]:
    """The cache, and the seconds of its pass: from the teacher's first answer that is kept, to the end.

    Before the pass the teacher is asked a few times about the first batch, however many there are; that is left out.
    """
    asked: list[float] = []
    hook = setting.teacher.register_forward_pre_hook(lambda *_: asked.append(clock(options.device)))
    cache = TeacherCache.build(
        setting.teacher,
        setting.examples,
        folder,
        data_collator=setting.collate,
        batch_size=options.batch,
        store=store,
        progress=False,
    )
    ended = clock(options.device)
    hook.remove()
    return CachedTeacher(cache), ended - asked[-options.batches]


def steps(setting: Setting, cached: dict[str, CachedTeacher], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step of each way; the order within a round rotates, and the first round is not counted."""
    t = setting.temperature
    distillers = {
        NO_TEACHER: Distiller(setting.student, alpha=0.0, temperature=t),
        **{name: Distiller(setting.student, one, alpha=0.5, temperature=t) for name, one in cached.items()},
        LIVE: Distiller(setting.student, setting.teacher, alpha=0.5, temperature=t),
    }
    ways = list(distillers)
    collators = {name: one.wrap_collator(setting.collate) for name, one in cached.items()}
    setting.student.to(options.device), setting.teacher.to(options.device)
    optimizer = torch.optim.SGD(setting.student.parameters(), lr=1e-4)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        at = options.batch * (turn % options.batches)
        for place in range(len(ways)):
            name = ways[(turn + place) % len(ways)]
            began = clock(options.device)
            batch = collators.get(name, setting.collate)(setting.examples[at : at + options.batch])
            moved = {key: value.to(options.device) for key, value in batch.items()}
            optimizer.zero_grad()
            distillers[name](setting.student, moved).loss.backward()
            optimizer.step()
            if turn:
                found[name].append(clock(options.device) - began)
    return found


def build_costs(setting: Setting, folder: Path, store: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of the pass, of the teacher's forward alone and of a look-up; bytes a token."""
    cached, seconds = built(setting, folder, store, options)
    batches = [
        setting.collate(setting.examples[at : at + options.batch])
        for at in range(0, len(setting.examples), options.batch)
    ]
    tokens = cached.cache.manifest["positions"]
    began = clock(options.device)
    with torch.no_grad():
        for batch in batches:
            setting.teacher(**{k: v.to(options.device) for k, v in batch.items() if k != "labels"})
    alone = clock(options.device) - began
    began = clock("cpu")
    for batch in batches * LOOK_UPS:
        cached.cache.look_up(batch)
    read = (clock("cpu") - began) / LOOK_UPS
    return {
        "bytes_a_token": cached.cache.bytes / tokens,
        "build_tokens_a_second": tokens / seconds,
        "forward_tokens_a_second": tokens / alone,
        "look_up_tokens_a_second": tokens / read,
        "cached": cached,
    }


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def table_of_steps(seconds: dict[str, list[float]]) -> list[str]:
    """Milliseconds, and ratio to no teacher and to the live one, medians over rounds with quartiles."""
    lines = ["| way | ms a step, median | ratio to no teacher (quartiles) | ratio to the live teacher |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[NO_TEACHER], strict=True)]
        to_live = statistics.median(a / b for a, b in zip(own, seconds[LIVE], strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        median = 1000 * statistics.median(own)
        lines.append(f"| {name} | {median:.1f} | {middle:.3f} ({low:.3f} to {high:.3f}) | {to_live:.3f} |")
    return lines


def table_of_stores(costs: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| store | bytes a token | build, tokens/s | teacher alone, tokens/s | look-up, tokens/s |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, one in costs.items():
        speeds = (one["build_tokens_a_second"], one["forward_tokens_a_second"], one["look_up_tokens_a_second"])
        figures = " | ".join(f"{speed:,.0f}" for speed in speeds)
        lines.append(f"| {name} | {one['bytes_a_token']:,.0f} | {figures} |")
    return lines


def table_of_errors(errors: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"| gradient's error | {' | '.join(errors)} |", "| --- |" + " ---: |" * len(errors)]
    for way in next(iter(errors.values())):
        lines.append(f"| {way} | {' | '.join(f'{of[way]:.1%}' for of in errors.values())} |")
    return lines


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What was measured, as plain data and as Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        setting = classifier(options)
        dense, _ = built(setting, Path(folder) / "classes", Dense(), options)
        of_classes = steps(setting, {CACHED: dense}, options)
        setting = language_model(options)
        costs = {n: build_costs(setting, Path(folder) / store.name, store, options) for n, store in STORES.items()}
        caches = {name: cost.pop("cached") for name, cost in costs.items()}
        of_tokens = steps(setting, {f"cached, {name}": caches[name] for name in TRAINED}, options)
    errors = gradient_errors(options.vocabulary)
    found = {"classes": of_classes, "tokens": of_tokens, "stores": costs, "errors": errors}
    text = ["Sequence classification, dense float16:", "", *table_of_steps(of_classes), ""]
    text += [f"Vocabulary of {options.vocabulary:,}:", "", *table_of_steps(of_tokens), ""]
    return found, "\n".join([*text, *table_of_stores(costs), "", *table_of_errors(errors)])


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, measure, print, and keep the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--student", type=int, nargs=2, default=(4, 256), metavar=("LAYERS", "WIDTH"))
    parser.add_argument("--teacher", type=int, nargs=2, default=(12, 768), metavar=("LAYERS", "WIDTH"))
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens of the longest example")
    parser.add_argument("--batches", type=int, default=4, help="how many different ones")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each way that count")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="a JSON file for all figures")
    parser.add_argument("--plot", type=Path, help="a PNG of the gradient's error against bytes a token; nothing else")
    options = parser.parse_args(arguments)
    if options.plot is not None:
        plot(options.vocabulary, options.plot)
        return
    load = os.getloadavg()[0]
    found, text = measure(options)
    print(f"{text}\n\nLoad of the machine: {load:.1f} before, {os.getloadavg()[0]:.1f} after.")
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
