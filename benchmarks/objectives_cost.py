"""Time and memory of a step with each objective, as ratios to plain logit distillation. No accuracy.

One student, one teacher, one batch. Time: forward passes, loss and backward (no optimizer), one step a way in turns, so
a machine that is busy for a while slows all of them; processor time, on CUDA the wall clock. Memory: in a process of
its own for each way, the peak of the process and the peak of live tensors, which is counted and the same each time.
Beside ours: what people write, `output_hidden_states=True` and `output_attentions=True` with eager attention.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when run as a script

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.live_tensors import LiveTensors
from hf_distill import AttentionMatch, CosineEmbedding, Distiller, HiddenMatch, LayerMap, RelationMatch, SimilarityMatch
from hf_distill.models.capture import AttentionRecord

TEMPERATURE, ALPHA = 2.0, 0.5
LOGITS = "logits only"
LAST = ((-1, -1),)
OURS: dict[str, Callable[[], list[Any]]] = {
    LOGITS: list,
    "CosineEmbedding": lambda: [CosineEmbedding()],
    "HiddenMatch, last layer": lambda: [HiddenMatch(LAST)],
    "HiddenMatch, every layer": lambda: [HiddenMatch("skip")],
    "HiddenMatch, every layer, projected": lambda: [HiddenMatch("skip", projection="linear")],
    "AttentionMatch, scores, last layer": lambda: [AttentionMatch(LAST)],
    "AttentionMatch, probabilities, last layer": lambda: [AttentionMatch(LAST, distance="probabilities")],
    "AttentionMatch, scores, every layer": lambda: [AttentionMatch("skip")],
    "RelationMatch, last layer": lambda: [RelationMatch()],
    "SimilarityMatch, last layer": lambda: [SimilarityMatch()],
}
NAIVE_HIDDEN, NAIVE_LAST = "by hand: hidden states, every layer", "by hand: attentions (eager), last layer"
NAIVE_ALL = "by hand: attentions (eager), every layer"
NAIVE = (NAIVE_HIDDEN, NAIVE_LAST, NAIVE_ALL)
WAYS = (*OURS, *NAIVE)
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """Both models and the batch, a quarter of whose positions is padding."""

    student: Any
    teacher: Any
    batch: Batch


def make(options: argparse.Namespace) -> Setting:
    """Random weights: neither time nor memory asks for better ones."""
    torch.manual_seed(0)
    shared = {
        "hidden_size": options.width,
        "num_attention_heads": options.heads,
        "intermediate_size": 4 * options.width,
        "vocab_size": 1000,
        "max_position_embeddings": options.length,
    }
    student, teacher = (
        BertForSequenceClassification(BertConfig(num_hidden_layers=n, **shared)).to(options.device)
        for n in (options.student_layers, options.teacher_layers)
    )
    lengths = torch.linspace(options.length / 2, options.length, options.batch).long()
    ids = torch.randint(1, 1000, (options.batch, options.length))
    mask = (torch.arange(options.length) < lengths[:, None]).long()
    labels = torch.arange(options.batch) % 2
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    batch = {name: x.to(options.device) for name, x in batch.items()}
    return Setting(student.train(), teacher.eval().requires_grad_(False), batch)


class Way:
    """One way to distil: a loss of the batch, and what it reads of the teacher."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting = name, setting
        self._distiller: Any = None
        if name in OURS:
            self._distiller = Distiller(
                setting.student,
                setting.teacher,
                alpha=ALPHA,
                temperature=TEMPERATURE,
                objectives=OURS[name]() or None,
                seed=0,
            )

    def step(self) -> None:
        """Forward passes, loss and backward."""
        self.setting.student.zero_grad()
        if self._distiller is not None:
            self._distiller.learned.zero_grad()
            self._distiller(self.setting.student, self.setting.batch).loss.backward()
        else:
            by_hand(self.name, self.setting).backward()

    def use(self) -> None:
        """By hand, attentions are had from eager attention alone."""
        kind = "eager" if self.name in (NAIVE_LAST, NAIVE_ALL) else "sdpa"
        for model in (self.setting.student, self.setting.teacher):
            if model.config._attn_implementation != kind:
                model.set_attn_implementation(kind)

    def read_of_teacher(self) -> int:
        """Bytes of the teacher's inside that are held until the loss is computed."""
        if self._distiller is None:
            outputs = ask_by_hand(self.name, self.setting.teacher, self.setting.batch)
            held: list[Any] = [*(outputs.hidden_states or ()), *(outputs.attentions or ())]
        else:
            needs = self._distiller.blending.needs(0.0)[1]
            held = list(self._distiller.teacher_signals(self.setting.batch, needs).activations.values())
        return sum(x.untyped_storage().nbytes() for x in unique_storages(held))


def unique_storages(held: list[Any]) -> Iterator[Tensor]:
    """A tensor for each piece of memory."""
    seen = set()
    for one in held:
        for x in (one.queries, one.keys) if isinstance(one, AttentionRecord) else (one,):
            if x.untyped_storage().data_ptr() not in seen:
                seen.add(x.untyped_storage().data_ptr())
                yield x


def ask_by_hand(name: str, model: Any, batch: Batch) -> Any:
    """The teacher's outputs, with all that the flags make a model return."""
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    with torch.no_grad():
        return model(**inputs, **_flags(name))


def _flags(name: str) -> dict[str, bool]:
    return {"output_hidden_states": True} if name == NAIVE_HIDDEN else {"output_attentions": True}


def by_hand(name: str, setting: Setting) -> Tensor:
    """What people write: the flags, and the loss over what they return; of padding and of nothing else left out."""
    batch = setting.batch
    ours = setting.student(**batch, **_flags(name))
    theirs = ask_by_hand(name, setting.teacher, batch)
    softened = F.log_softmax(ours.logits / TEMPERATURE, -1), F.log_softmax(theirs.logits / TEMPERATURE, -1)
    divergence = F.kl_div(*softened, log_target=True, reduction="batchmean") * TEMPERATURE**2
    loss = (1 - ALPHA) * ours.loss + ALPHA * divergence
    mask = batch["attention_mask"].bool()
    depths = setting.student.config.num_hidden_layers, setting.teacher.config.num_hidden_layers
    links = LayerMap.skip(*depths).links if name != NAIVE_LAST else LayerMap.pairs(LAST, *depths).links
    for link in links:
        if name == NAIVE_HIDDEN:
            q, p = ours.hidden_states[link.student + 1], theirs.hidden_states[link.teacher + 1]
            loss = loss + (q[mask] - p[mask]).square().mean()
        else:
            rows = mask[:, None, :].expand(-1, ours.attentions[0].shape[1], -1)
            q, p = ours.attentions[link.student][rows], theirs.attentions[link.teacher][rows]
            loss = loss + F.mse_loss(q, p, reduction="sum") / mask.sum()
    return loss


def memory(way: Way) -> dict[str, int | None]:
    """Bytes: peak of this process (of the GPU, on CUDA) after two steps, peak of live tensors in a third."""
    way.use()
    for _ in range(2):
        way.step()
    if way.setting.batch["labels"].is_cuda:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    way.setting.student.zero_grad()
    with LiveTensors() as live:
        way.step()
    return {"process": peak, "live": live.peak, "read": way.read_of_teacher()}


def memories(options: argparse.Namespace, names: list[str]) -> dict[str, dict[str, int | None]]:
    """Of each way; in processes of their own unless that is switched off, and then that of the process is unknown."""
    if options.one_process:
        setting = make(options)
        return {name: {**memory(Way(name, setting)), "process": None} for name in names}
    found = {}
    for name in names:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def times(options: argparse.Namespace, names: list[str]) -> dict[str, list[float]]:
    """Seconds of each step; the order within a round rotates, and the first round is not counted."""
    setting = make(options)
    ways = [Way(name, setting) for name in names]
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.rounds + 1):
        for place in range(len(ways)):
            way = ways[(turn + place) % len(ways)]
            way.use()
            began = clock(options.device)
            way.step()
            seconds = clock(options.device) - began
            if turn:
                found[way.name].append(seconds)
    return found


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def markdown(found: dict[str, Any]) -> str:
    """A row a way: milliseconds and ratio of time, bytes read of the teacher, and peaks less those of logits only."""
    base, memory_of = found["seconds"][LOGITS], found["memory"]
    lines = [
        "| way | ms a step, median | ratio (quartiles over rounds) | read of the teacher, MB | "
        "peak of live tensors, MB more | peak of the process, MB more |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, seconds in found["seconds"].items():
        ratios = [a / b for a, b in zip(seconds, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        more = [
            "-" if memory_of[name][key] is None else f"{(memory_of[name][key] - memory_of[LOGITS][key]) / 1e6:+.1f}"
            for key in ("live", "process")
        ]
        ratio = f"{middle:.3f} ({low:.3f} to {high:.3f})"
        read = f"{memory_of[name]['read'] / 1e6:.1f}"
        lines.append(f"| {name} | {1000 * statistics.median(seconds):.1f} | {ratio} | {read} | {' | '.join(more)} |")
    whole = memory_of[LOGITS]
    process = "" if whole["process"] is None else f", of the process {whole['process'] / 1e6:.0f} MB"
    lines += ["", f"With {LOGITS}: peak of live tensors {whole['live'] / 1e6:.0f} MB{process}."]
    return "\n".join(lines)


def main() -> None:
    """Read the command line; measure one way's memory, or everything."""
    options = parse()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if options.memory_of:
        print(json.dumps(memory(Way(options.memory_of, make(options)))))
        return
    names = [LOGITS, *(name for name in options.ways if name != LOGITS)]
    load = os.getloadavg()[0]
    found = {"memory": memories(options, names), "seconds": times(options, names)}
    if options.output:
        options.output.write_text(json.dumps({"options": {**vars(options), "output": None}, **found}))
    print(
        f"student {options.student_layers} layers, teacher {options.teacher_layers}, {options.width} wide, "
        f"{options.heads} heads, {options.batch} x {options.length} tokens, {options.rounds} rounds, {options.device}, "
        f"{torch.get_num_threads()} thread(s), load {load:.1f} before and {os.getloadavg()[0]:.1f} after\n"
    )
    print(markdown(found))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--teacher-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384, help="of both models")
    parser.add_argument("--heads", type=int, default=12, help="of both models")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest example")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each way that are counted")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--one-process", action="store_true", help="no process a way: the peak of processes is left out"
    )
    parser.add_argument("--output", type=Path, help="JSON file for every number that was measured")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
