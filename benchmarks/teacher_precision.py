"""What a teacher says in fewer bits, beside what it says in fp32: KL, the same choice, time of a forward. No training.

The teacher is the MiniLM that `real_data.py sst2` fine-tunes, asked about the sentences of SST-2's dev split. Where
the encoder or the data are not there, it is a BERT made from a config, with logits of standard deviation 3, asked about
tokens drawn at random; the report says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when run as a script

import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import protocol
from benchmarks.places import data_folder, encoder_folder
from benchmarks.sets import sst2
from hf_distill import SettingError
from hf_distill.functional import forward_kl
from hf_distill.signals import Needs
from hf_distill.tasks import make_task
from hf_distill.teachers import Teacher, as_teacher

FULL = "fp32"
DTYPES = {FULL: "float32", "bf16": "bfloat16", "fp16": "float16"}
INT8 = "int8_dynamic"
ROUNDING = 2.0**-8  # by how much of itself bf16 moves a number at most
Batch = dict[str, torch.Tensor]


def fine_tuned(options: argparse.Namespace) -> tuple[Any, list[Batch], str]:
    """The teacher of `real_data.py sst2`, the dev split in batches of like length, and what they are."""
    folder, encoder = data_folder(options.data_dir, "sst2"), encoder_folder(options.encoder)
    case = sst2.load(folder, encoder, teacher_steps=options.teacher_steps)
    trained = protocol.Trainings(case, options.work_dir, lambda line: print(line, flush=True))
    model = trained("teacher", case.teacher_settings[0], 0).model
    rows = sorted(case.dev[: options.examples], key=lambda row: len(row["input_ids"]))
    batches = [case.collator(rows[i : i + options.batch]) for i in range(0, len(rows), options.batch)]
    return model, [dict(batch) for batch in batches], f"MiniLM, {options.teacher_steps} steps on SST-2, its dev split"


def made_up(options: argparse.Namespace) -> tuple[Any, list[Batch], str]:
    """A BERT that has learned nothing, and tokens by chance."""
    torch.manual_seed(0)
    heads = {
        "num_attention_heads": max(1, options.width // 32),
        "intermediate_size": 4 * options.width,
        "num_labels": 2,
    }
    config = BertConfig(hidden_size=options.width, num_hidden_layers=options.layers, vocab_size=1000, **heads)
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(5, 1000, (options.examples, options.length))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(options.batch)]
    with torch.no_grad():
        spread = torch.cat([model(**batch).logits for batch in batches]).std(0).mean()
        model.classifier.weight.mul_(3 / spread)
    return model, batches, f"a BERT of {options.layers} x {options.width} made from a config, tokens at random"


def in_precision(name: str, model: Any, device: str) -> Teacher:
    """The model as the library holds it in this precision."""
    kind = make_task(model, None).kind
    if name == INT8:
        return as_teacher(copy.deepcopy(model), kind, quantization=INT8)
    teacher = as_teacher(copy.deepcopy(model).to(device), kind, dtype=DTYPES[name])
    assert isinstance(teacher, Teacher)
    return teacher


def asked(teacher: Teacher, task: Any, batches: Sequence[Batch]) -> torch.Tensor:
    """What it says of all rows, `[n v]`."""
    said = [task.select(teacher(task, batch, Needs(logits=True)).predictions(), batch) for batch in batches]
    return torch.cat(said).float()


def compared(exact: torch.Tensor, said: torch.Tensor, temperature: float) -> dict[str, float]:
    """Distances of rows from those in fp32."""
    kl = forward_kl(said.double() / temperature, exact.double() / temperature).clamp(min=0)
    largest = exact.abs().max().item() / temperature
    return {
        "kl": kl.mean().item(),
        "kl_largest": kl.max().item(),
        "roundings": (2 * kl.max().item()) ** 0.5 / (ROUNDING * largest),
        "same": (exact.argmax(-1) == said.argmax(-1)).float().mean().item(),
    }


def measured(options: argparse.Namespace, model: Any, batches: Sequence[Batch]) -> dict[str, Any]:
    """Precision → seconds a batch on both clocks, round by round, and distances; why others are absent."""
    task, device = make_task(model, None), options.device
    batches = [{name: x.to(device) for name, x in batch.items()} for batch in batches]
    found: dict[str, Any] = {"seconds": {}, "apart": {}, "absent": {}}
    teachers, exact = {}, torch.empty(0)
    for name in dict.fromkeys([FULL, *options.precisions]):
        try:
            if name == INT8 and device != "cpu":
                raise SettingError("computes on a CPU")
            teachers[name] = in_precision(name, model, device)
            said = asked(teachers[name], task, batches)  # warms up as well
        except SettingError as why:
            teachers.pop(name, None)
            found["absent"][name] = str(why)
            continue
        exact = said if name == FULL else exact
        found["apart"][name], found["seconds"][name] = compared(exact, said, options.temperature), []
    for _ in range(options.rounds):
        for name, teacher in teachers.items():
            begin = now(device)
            asked(teacher, task, batches)
            end = now(device)
            found["seconds"][name].append([(b - a) / len(batches) for a, b in zip(begin, end, strict=True)])
    return found | {"rows": len(exact), "largest_logit": exact.abs().max().item()}


def now(device: str) -> tuple[float, float]:
    """By the wall's clock, and of this process."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def table(found: dict[str, Any], *, clock: int) -> str:
    """One line a precision; the fastest round."""
    best = {name: min(turn[clock] for turn in turns) for name, turns in found["seconds"].items()}
    lines = [
        "| teacher | KL to fp32, nats a row | of the furthest row | in roundings | same choice | s a batch | × fp32 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, seconds in best.items():
        far = found["apart"][name]
        shown = f"{far['kl']:.1e} | {far['kl_largest']:.1e} | {far['roundings']:.2f} | {far['same']:.2%}"
        lines.append(f"| {name} | {shown} | {seconds:.4f} | {seconds / best[FULL]:.2f} |")
    return "\n".join([*lines, *(f"| {name} | absent: {why} | | | | | |" for name, why in found["absent"].items())])


def main() -> None:
    """Read the command line, measure, print the table."""
    options = parse()
    torch.set_num_threads(options.threads)
    logging.getLogger("hf_distill").setLevel(logging.ERROR)  # a quantised teacher says how far it is, once more
    if options.made_up:
        model, batches, what = made_up(options)
    else:
        try:
            model, batches, what = fine_tuned(options)
        except SystemExit as lacking:
            if options.data_dir or options.encoder:
                raise
            print(f"Made up, because there is {lacking}\n")
            model, batches, what = made_up(options)
    found = measured(options, model, batches)
    if options.output:
        options.output.write_text(json.dumps({"what": what, **found}))
    print(
        f"\n{what}: {found['rows']} rows in batches of {options.batch}, T {options.temperature:g}, largest logit "
        f"{found['largest_logit']:.2f}, {options.threads} thread(s), "
        f"{'processor time' if options.processor_time else 'wall clock'}, fastest of {options.rounds}\n\n"
        f"{table(found, clock=int(options.processor_time))}\n\n"
        "In roundings: r of KL = ½ (r · 2⁻⁸ · largest logit / T)² for the furthest row."
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [*DTYPES, INT8]
    add("--precisions", nargs="+", choices=names, default=[FULL, "bf16", INT8], metavar="NAME", help=", ".join(names))
    add("--examples", type=int, default=872, help="asked about; dev has 872")
    add("--batch", type=int, default=32)
    add("--temperature", type=float, default=2.0, help="of the KL")
    add("--rounds", type=int, default=3, help="how often each precision has its turn, after one to warm up")
    add("--threads", type=int, default=1)
    add("--device", default="cpu", help="cpu or cuda")
    add("--processor-time", action="store_true", help="for a busy machine; counts all threads")
    add("--teacher-steps", type=int, default=1000, help="of fine-tuning")
    add("--work-dir", type=Path, help="keeps the fine-tuned teacher; that of real_data.py may be given")
    add("--data-dir", help="folder that holds sst2/")
    add("--encoder", help="folder of the pretrained encoder")
    add("--made-up", action="store_true", help="the teacher made from a config, whatever is there")
    add("--layers", type=int, default=6, help="of the made-up teacher")
    add("--width", type=int, default=384, help="of the made-up teacher")
    add("--length", type=int, default=48, help="tokens of a made-up example")
    add("--output", type=Path, help="JSON file for every number")
    return parser.parse_args()


if __name__ == "__main__":
    main()
