"""Ways to distil a small causal language model, on a language whose teacher is trained here: no data, no download.

The language is a Markov chain of second order over 29 tokens. Of a seed every student has the same start, the same few
gold texts (or their prompts) and the same optimizer steps. Measured: the loss on held-out gold texts, and KL(student |
teacher) on texts that the student writes itself. Sizes are tiny: ways are compared, not what large models would do.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback
from transformers.utils import logging

from hf_distill import DistillationArguments, DistillationTrainer, UniversalLogitMatch, generate_completions
from hf_distill.augment import OnPolicy

TOKENS, LENGTH, PROMPT = 32, 20, 4
Rows = list[dict[str, list[int]]]


class Language:
    """Texts of the chain; the first three tokens are special and never occur."""

    def __init__(self) -> None:
        self._draw = torch.Generator().manual_seed(0)
        chain = torch.softmax(2.5 * torch.randn(TOKENS, TOKENS, TOKENS, generator=self._draw), -1)
        chain[..., :3] = 0
        self._chain = chain / chain.sum(-1, keepdim=True)

    def texts(self, count: int) -> Tensor:
        """`[count t]`"""
        found = torch.randint(3, TOKENS, (count, 2), generator=self._draw)
        while found.shape[1] < LENGTH:
            rows = self._chain[found[:, -2], found[:, -1]]
            found = torch.cat([found, torch.multinomial(rows, 1, generator=self._draw)], 1)
        return found


def rows_of(texts: Tensor) -> Rows:
    return [{"input_ids": ids, "labels": [-100] * PROMPT + ids[PROMPT:]} for ids in texts.tolist()]


def llama(layers: int, width: int, seed: int) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, max_position_embeddings=64, **shape, **ends, **heads))


def trained(model: Any, data: Rows, *, steps: int, teacher: Any = None, seed: int = 0, **given: Any) -> Any:
    own = {name: given.pop(name) for name in ("objectives", "view") if name in given}
    args = DistillationArguments(
        tempfile.mkdtemp(), max_steps=steps, learning_rate=3e-3, per_device_train_batch_size=16, seed=seed,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no",
        remove_unused_columns=False, **given,
    )  # fmt: skip
    trainer = DistillationTrainer(model=model, teacher_model=teacher, args=args, train_dataset=data, **own)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval()


def measured(student: Any, teacher: Any, held_out: Tensor) -> tuple[float, float]:
    """Mean loss of the held-out answers, and the reverse KL a token of the student's own."""
    torch.manual_seed(1)
    labels = held_out.masked_fill(torch.arange(LENGTH) < PROMPT, -100)
    with torch.no_grad():
        gold = student(input_ids=held_out, labels=labels).loss.item()
        own = student.generate(
            input_ids=held_out[:, :PROMPT], attention_mask=torch.ones_like(held_out[:, :PROMPT]), do_sample=True,
            max_new_tokens=LENGTH - PROMPT, min_new_tokens=LENGTH - PROMPT, top_k=0,
        )  # fmt: skip
        q, p = (model(input_ids=own).logits[:, PROMPT - 1 : -1].log_softmax(-1) for model in (student, teacher))
    return gold, (q.exp() * (q - p)).sum(-1).mean().item()


def with_other_ids(teacher: Any, gold: Rows) -> tuple[Any, Rows]:
    """The same teacher behind another numbering of the tokens, and the texts in it."""
    renamed = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        for table, source in ((other.model.embed_tokens, teacher.model.embed_tokens), (other.lm_head, teacher.lm_head)):
            table.weight[renamed] = source.weight.clone()
    ids = renamed.tolist()
    theirs = [{f"teacher_{name}": [v if v < 0 else ids[v] for v in x] for name, x in row.items()} for row in gold]
    return other, [{**row, **own} for row, own in zip(gold, theirs, strict=True)]


def ways(teacher: Any, gold: Rows, steps: int) -> dict[str, Callable[[int], Any]]:
    """Name → a student of that seed."""
    prompts = datasets.Dataset.from_list([{"input_ids": row["input_ids"][:PROMPT]} for row in gold])
    written = generate_completions(
        teacher, prompts, f"{tempfile.mkdtemp()}/texts", max_new_tokens=LENGTH - PROMPT, do_sample=True, batch_size=64,
        num_return_sequences=8, generation={"min_new_tokens": LENGTH - PROMPT},
    )  # fmt: skip
    theirs = [{name: row[name] for name in ("input_ids", "labels")} for row in written]
    other, both = with_other_ids(teacher, gold)

    def student(data: Rows, asked: Any = None, alpha: float = 0.0, **given: Any) -> Callable[[int], Any]:
        plain = {"steps": steps, "alpha": alpha, "temperature": 1.0}
        return lambda seed: trained(llama(1, 24, seed), data, teacher=asked, seed=seed, **plain, **given)

    def on_policy(student_share: float, divergence: str) -> Callable[[int], Any]:
        view = OnPolicy(student_share=student_share, max_new_tokens=LENGTH - PROMPT)
        return student(gold, teacher, alpha=1.0, divergence=divergence, on_policy=view)

    return {
        "gold labels": student(gold),
        "the teacher's texts, 8 a prompt, as labels": student(theirs),
        "forward KL on gold texts": student(gold, teacher, alpha=1.0),
        "reverse KL on gold texts": student(gold, teacher, alpha=1.0, divergence="reverse_kl"),
        "Jensen-Shannon on gold texts": student(gold, teacher, alpha=1.0, divergence="jensen_shannon"),
        "reverse KL, all batches continued by the student": on_policy(1.0, "reverse_kl"),
        "Jensen-Shannon, half of the batches continued": on_policy(0.5, "jensen_shannon"),
        **{
            f"gold labels + {weight} universal logits, other tokenizer": student(
                both, other, objectives=UniversalLogitMatch(weight=weight)
            )
            for weight in (0.2, 1.5)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="students of each way")
    parser.add_argument("--steps", type=int, default=400, help="of a student, 16 texts each")
    parser.add_argument("--teacher-steps", type=int, default=1500, help="of the teacher")
    parser.add_argument("--ways", nargs="*", default=[""], help="of the rows only those that hold one of these words")
    parser.add_argument("--gold", type=int, default=256, help="gold texts")
    asked = parser.parse_args()
    logging.set_verbosity_error()
    language = Language()
    teacher = trained(llama(2, 64, 1), rows_of(language.texts(6000)), steps=asked.teacher_steps, alpha=0.0)
    gold, held_out = rows_of(language.texts(asked.gold)), language.texts(400)
    print("| | held-out loss | reverse KL on own texts |\n| --- | ---: | ---: |")
    print(f"| the teacher | {measured(teacher, teacher, held_out)[0]:.3f} | 0 |", flush=True)
    for name, make in ways(teacher, gold, asked.steps).items():
        if not any(word in name for word in asked.ways):
            continue
        found = [measured(make(seed), teacher, held_out) for seed in range(asked.seeds)]
        shown = []
        for values in zip(*found, strict=True):
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            shown.append(f"{statistics.mean(values):.3f}{spread}")
        print(f"| {name} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
