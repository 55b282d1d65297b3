"""The card of a cache, as a dataset on the Hub: what it holds, of which teacher, and how it is used."""

from __future__ import annotations

from typing import Any

from hf_distill.teachers.cache.hidden import kept_reads
from hf_distill.teachers.cache.size import readable

_CARD = """---
tags:
- hf-distill
- knowledge-distillation
configs:
- config_name: default
  data_files: "shard-*.arrow"
---

# What a teacher said

What a teacher ({model}, {name}) said of {examples:,} examples, to distil it without running it again. Made by
hf-distill. The examples themselves are not in it: each is known by a hash of its content.

| | |
|---|---|
| head | {kind}, {columns} columns |
| kept | {store} |
{beside}| examples | {examples:,} |
| rows of predictions | {positions:,} |
| size | {size} |
| weights of the teacher | `{weights}` |
| inputs that a hash is of | {inputs} |
| padding | {padding} |

```python
from hf_distill import DistillationTrainer
from hf_distill.teachers import CachedTeacher

trainer = DistillationTrainer(model=student, teacher_model=CachedTeacher.from_hub("this repository"), ...)
```

The columns `high` and `low` are the two halves of an example's key, `positions` says how many rows of predictions it
has, and the others hold those rows one after the other.
"""


def card_of(manifest: dict[str, Any]) -> str:
    """Markdown, from a manifest alone."""
    store = ", ".join(f"{name} {value}" if name != "name" else value for name, value in manifest["store"].items())
    padding = manifest["padding"]
    change = manifest["measured"]["change_by_padding"]
    said = "not measured (nothing was padded in the first batch)" if change is None else f"{change:.2g}, relative"
    return _CARD.format(
        model=manifest["teacher"]["class"],
        name=manifest["teacher"]["name"] or "no name",
        kind=manifest["task"]["kind"],
        columns=manifest["predictions"]["columns"],
        store=store,
        examples=manifest["dataset"]["examples"],
        positions=manifest["positions"],
        size=readable(sum(one["bytes"] for one in manifest["shards"])),
        weights=manifest["teacher"]["weights"],
        beside=_beside(manifest),
        inputs=", ".join(manifest["inputs"]["columns"]),
        padding=f"batches of {padding['batch_size']}, side: {padding['side'] or 'none'}; change by padding: {said}",
    )


def _beside(manifest: dict[str, Any]) -> str:
    """Rows of the table that not every cache has."""
    rows = []
    bound, inside, views = manifest["predictions"]["temperature"], manifest["inside"], manifest["views"]
    if bound is not None:
        rows.append(f"| for temperature | {bound:g} alone |")
    if inside is not None:
        rows.append(f"| of its inside | {', '.join(map(str, kept_reads(inside)))}; {inside['dtype']} |")
    if views is not None:
        rows.append(f"| versions of each example | {views['views']}, by {', '.join(views['augmentations'])} |")
    return "".join(f"{row}\n" for row in rows)
