"""`hf-distill cache`: ask a teacher once about a dataset, or say what a cache holds. The work is `TeacherCache`'s."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hf_distill.cli.dataset import add_dataset_arguments, dataset_of
from hf_distill.cli.resumable import resumable
from hf_distill.cli.stores import add_store_options, store_of
from hf_distill.errors import SettingError

if TYPE_CHECKING:
    from hf_distill.teachers import TeacherCache

# The library's own lists, which would take seconds to import for the help: tests/cli/test_quick.py compares them.
_TASKS = (
    *("causal_lm", "classification", "ctc", "embedding", "masked_lm", "multiple_choice", "regression", "seq2seq"),
    *("span", "token_classification"),
)
_TEACHER_DTYPES = ("auto", "float32", "bfloat16", "float16")
_INSIDE_DTYPES = ("float16", "bfloat16", "float32")
_INPUTS = ("input_ids", "input_values", "input_features", "pixel_values")


def add_command(commands: Any) -> None:
    """Add `cache` to the subcommands of a parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "cache",
        help="ask a teacher once about a dataset, so that training need not run it",
        description="Builds a folder of what a teacher predicts for every example of a dataset, or says what such a "
        "folder holds. A build that is interrupted goes on when the same command is given again. For several "
        "processes: accelerate launch -m hf_distill.cli.main cache build ...",
    )
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    _add_build(kinds)
    show: argparse.ArgumentParser = kinds.add_parser("show", help="check a cache's files, and say what it holds")
    show.add_argument("folder", type=Path, metavar="CACHE", help="a folder that `cache build` filled")
    show.set_defaults(run=_show)


def _add_build(kinds: Any) -> None:
    build: argparse.ArgumentParser = kinds.add_parser(
        "build",
        help="ask the teacher about every example",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    build.add_argument("teacher", metavar="TEACHER", help="folder or Hub id of the model")
    add_dataset_arguments(build)
    build.add_argument("folder", type=Path, metavar="CACHE", help="the folder to fill")
    build.add_argument("--task", choices=_TASKS, help="the kind of head; else that of the checkpoint")
    build.add_argument("--text-column", help="text to tokenize, where the dataset is not tokenized")
    build.add_argument("--text-pair-column", help="second text of each example")
    build.add_argument("--max-length", type=int, help="tokens an example is cut to; else what the tokenizer says")
    build.add_argument("--batch-size", type=int, default=32, help="consecutive examples in a forward")
    add_store_options(build)
    build.add_argument(
        "--hidden",
        type=int,
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="BLOCK",
        help="keep the hidden states of these blocks, counted from 0, for objectives on the inside; -1: the embeddings",
    )
    build.add_argument(
        "--inside-dtype", choices=_INSIDE_DTYPES, default="float16", help="of hidden states, on the disk"
    )
    build.add_argument(
        "--no-predictions", action="store_true", help="with --hidden: keep hidden states alone (to train at alpha=None)"
    )
    build.add_argument(
        "--teacher-dtype", choices=_TEACHER_DTYPES, help="of the teacher's weights; else the checkpoint's own"
    )
    build.add_argument("--workers", type=int, default=0, help="processes that make batches")
    build.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> None:
    console = Console()
    with resumable(console, arguments.folder, counted="examples", noun="examples"):
        cache = _built(arguments, console)
    console.print(f"{cache!r} in {arguments.folder}", highlight=False)
    console.print("To train with it: DistillationTrainer(teacher_model=CachedTeacher(folder), ...)", highlight=False)


def _built(arguments: argparse.Namespace, console: Console) -> TeacherCache:
    from hf_distill.cli.progress import quiet_libraries
    from hf_distill.teachers import TeacherCache
    from hf_distill.teachers.load import find_tokenizer

    with quiet_libraries():
        tokenizer = find_tokenizer(arguments.teacher)
        data = _tokenized(dataset_of(arguments), tokenizer, arguments)
        return TeacherCache.build(
            arguments.teacher,
            data,
            arguments.folder,
            task=arguments.task,
            dtype=arguments.teacher_dtype,
            processing_class=tokenizer,
            batch_size=arguments.batch_size,
            store=None if arguments.no_predictions else store_of(arguments),
            predictions=not arguments.no_predictions,
            reads=[("hidden", block) for block in getattr(arguments, "hidden", ())],
            inside_dtype=arguments.inside_dtype,
            num_workers=arguments.workers,
            say=lambda text: console.print(text, highlight=False),
        )


def _show(arguments: argparse.Namespace) -> None:
    from hf_distill.teachers import TeacherCache

    cache, console = TeacherCache(arguments.folder), Console()
    manifest, inside = cache.manifest, cache.inside.kept
    beside = [f"inside: {', '.join(map(str, inside))}, {manifest['inside']['dtype']}"] if inside else []
    if manifest.get("views"):
        beside.append(f"versions of each example: {manifest['views']['views']}")
    if cache.bound_to is not None:
        beside.append(f"predictions are for temperature {cache.bound_to:g} alone")
    for line in (
        f"{cache!r}, every checksum is right",
        f"teacher: {manifest['teacher']['class']}, weights {manifest['teacher']['weights']}",
        f"head: {manifest['task']['kind']}, {manifest['predictions']['columns']} columns",
        f"kept of each row: {', '.join(f'{name} {value}' for name, value in manifest['store'].items())}",
        f"keyed by: {', '.join(manifest['inputs']['columns'])}",
        f"rows of predictions: {manifest['positions']:,}",
        *beside,
        f"files: {len(manifest['shards'])} shards, built with "
        + ", ".join(f"{name} {number}" for name, number in manifest["versions"].items()),
    ):
        console.print(line, highlight=False)


def _tokenized(data: Any, tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """As it is, where it has what a model reads; else its text as the teacher's tokenizer cuts it."""
    if arguments.text_column is None:
        if not set(_INPUTS) & set(data.column_names):
            raise SettingError(
                f"the dataset has the columns {', '.join(data.column_names)}, none of which a model reads "
                f"({', '.join(_INPUTS)}). Say which is text: --text-column."
            )
        return data
    wanted = [name for name in (arguments.text_column, arguments.text_pair_column) if name is not None]
    missing = [name for name in wanted if name not in data.column_names]
    if missing or tokenizer is None:
        what = f"no column {', '.join(missing)}" if missing else f"no tokenizer beside {arguments.teacher!r}"
        raise SettingError(
            f"--text-column: there is {what}. The dataset has {', '.join(data.column_names)}; the teacher's folder "
            "must hold its tokenizer, or the dataset be tokenized."
        )
    return data.map(
        lambda some: tokenizer(*(some[name] for name in wanted), truncation=True, max_length=arguments.max_length),
        batched=True,
        desc=None,
    )
