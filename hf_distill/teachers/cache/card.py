"""The card of a cache on the Hub: what it holds, from which teacher, and how to use it."""

from __future__ import annotations

from hf_distill.teachers.cache.hidden import stored_activations
from hf_distill.teachers.passes import readable_bytes
from hf_distill.teachers.shards import Json

_CARD = """---
tags:
- hf-distill
- knowledge-distillation
configs:
- config_name: default
  data_files: "shard-*.arrow"
---

# Stored predictions of a teacher

The predictions of a teacher ({model}, {name}) for {examples:,} examples, to distil it without running it again. Made by
hf-distill. The examples themselves are not included: each is identified by a hash of its content.

| | |
|---|---|
| head | {kind}, {columns} columns |
| kept | {store} |
{more_rows}| examples | {examples:,} |
| rows of predictions | {positions:,} |
| size | {size} |
| teacher weights | `{weights}` |
| hashed inputs | {inputs} |
| padding | {padding} |

```python
from hf_distill import DistillationTrainer
from hf_distill.teachers import CachedTeacher

trainer = DistillationTrainer(model=student, teacher_model=CachedTeacher.from_hub("this repository"), ...)
```

The columns `high` and `low` are the two halves of an example's key, `positions` is its number of rows of predictions,
and the other columns hold these rows one after the other.
"""


def card_of(manifest: Json) -> str:
    """Return the card in Markdown."""
    store = ", ".join(f"{name} {value}" if name != "name" else value for name, value in manifest["store"].items())
    padding = manifest["padding"]
    change = manifest["measured"]["change_by_padding"]
    measured = "not measured (nothing was padded in the first batch)" if change is None else f"{change:.2g}, relative"
    return _CARD.format(
        model=manifest["teacher"]["class"],
        name=manifest["teacher"]["name"] or "no name",
        kind=manifest["task"]["kind"],
        columns=manifest["predictions"]["columns"],
        store=store,
        examples=manifest["examples"],
        positions=manifest["positions"],
        size=readable_bytes(sum(shard["bytes"] for shard in manifest["shards"])),
        weights=manifest["teacher"]["weights"],
        more_rows=_more_rows(manifest),
        inputs=", ".join(manifest["inputs"]["columns"]),
        padding=f"batches of {padding['batch_size']}, side: {padding['side'] or 'none'}; change by padding: {measured}",
    )


def _more_rows(manifest: Json) -> str:
    """Return the rows of the table that not every cache has."""
    rows, activations, augmentation = "", manifest["activations"], manifest["augmentation"]
    if manifest["predictions"]["temperature"] is not None:
        rows += f"| temperature | {manifest['predictions']['temperature']:g} only |\n"
    if activations is not None:
        kept = ", ".join(map(str, stored_activations(activations)))
        rows += f"| activations | {kept}; {activations['dtype']} |\n"
    if augmentation is not None:
        names = ", ".join(augmentation["augmentations"])
        rows += f"| versions of each example | {augmentation['views']}, by {names} |\n"
    return rows
