"""The options of `hf-distill cache build` that say what is kept of each row of predictions, and the store they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hf_distill.cli.dataset import add_dataset_arguments, dataset_of, resumable
from hf_distill.errors import SettingError

if TYPE_CHECKING:
    from hf_distill.teachers.cache import Dense, Hybrid, Sampled, TopK

# Which options a store has.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "dense": ("store_dtype",),
    "top_k": ("top_k", "temperature", "store_dtype"),
    "sampled": ("samples", "temperature", "proposal_power", "seed"),
    "hybrid": ("top_k", "samples", "temperature", "store_dtype", "seed"),
}


def add_store_options(build: argparse.ArgumentParser) -> None:
    """Add them to the parser of `cache build`; what is not given is not among the arguments."""
    build.add_argument(
        "--store",
        default=argparse.SUPPRESS,
        choices=tuple(_OPTIONS),
        help="of each row keep: all columns; the likeliest and the others as one; columns drawn by their probability; "
        "or the likeliest and draws from the others. Without it: dense, or top_k where --top-k is given "
        "or a vocabulary has more than 4,096 columns",
    )
    build.add_argument(
        "--top-k", default=argparse.SUPPRESS, type=int, help="columns kept of each row, with top_k (64) and hybrid (16)"
    )
    build.add_argument(
        "--samples",
        default=argparse.SUPPRESS,
        type=int,
        help="columns drawn of each row, with sampled (32) and hybrid (16)",
    )
    build.add_argument(
        "--temperature",
        default=argparse.SUPPRESS,
        type=float,
        nargs="+",
        help="to train at: one or several with top_k (1 and 2), one with sampled and hybrid (1)",
    )
    build.add_argument(
        "--proposal-power",
        default=argparse.SUPPRESS,
        type=float,
        help="with sampled: draw in proportion to p to this power (1)",
    )
    build.add_argument("--seed", default=argparse.SUPPRESS, type=int, help="of the draws, with sampled and hybrid (0)")
    build.add_argument(
        "--store-dtype",
        default=argparse.SUPPRESS,
        choices=("float16", "bfloat16", "float32"),
        help="of logits or log-probabilities (float16)",
    )


def store_of(arguments: argparse.Namespace) -> Dense | TopK | Sampled | Hybrid | None:
    """What the options say; None: nothing, so that what is kept depends on the head.

    Raises:
        SettingError: an option that the store does not have, or a value that it does not take.
    """
    every = {option for options in _OPTIONS.values() for option in options}
    given = {option: value for option, value in vars(arguments).items() if option in every}
    if not given and "store" not in arguments:
        return None
    name: str = vars(arguments).get("store", "top_k" if "top_k" in given else "dense")
    for option in given:
        if option not in _OPTIONS[name]:
            having = [store for store, options in _OPTIONS.items() if option in options]
            raise SettingError(
                f"--{option.replace('_', '-')} with --store {name}: that store has no such option. It is for --store "
                f"{', '.join(having)}."
            )
    return _made(name, given)


def _made(name: str, given: dict[str, Any]) -> Dense | TopK | Sampled | Hybrid:
    from hf_distill.teachers.cache import Dense, Hybrid, Sampled, TopK

    renamed = {"top_k": "k", "store_dtype": "dtype"}
    settings = {renamed.get(option, option): value for option, value in given.items()}
    if name == "dense":
        return Dense(**settings)
    temperatures = settings.pop("temperature", None)
    if temperatures is not None and name == "top_k":
        settings["temperatures"] = tuple(temperatures)
    elif temperatures is not None:
        if len(temperatures) > 1:
            listed = " ".join(f"{t:g}" for t in temperatures)
            raise SettingError(f"--temperature {listed}: draws hold for one temperature, that of the training.")
        settings["temperature"] = temperatures[0]
    stores: dict[str, type[TopK | Sampled | Hybrid]] = {"top_k": TopK, "sampled": Sampled, "hybrid": Hybrid}
    return stores[name](**settings)


if TYPE_CHECKING:
    from hf_distill.teachers import TeacherCache

# The library's own lists, which would take seconds to import for the help: tests/cli/test_quick.py compares them.
_TASKS = (
    *("causal_lm", "classification", "ctc", "embedding", "masked_lm", "multiple_choice", "regression", "seq2seq"),
    *("span", "token_classification"),
)
_TEACHER_DTYPES = ("auto", "float32", "bfloat16", "float16")
_ACTIVATION_DTYPES = ("float16", "bfloat16", "float32")
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
        help="keep the hidden states of these blocks, counted from 0, for such objectives; -1: the embeddings",
    )
    build.add_argument(
        "--activation-dtype", choices=_ACTIVATION_DTYPES, default="float16", help="of hidden states, on the disk"
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
    from hf_distill.teachers import BuildOptions, KeepActivations, TeacherCache
    from hf_distill.teachers.load import find_tokenizer

    hidden: list[int] = vars(arguments).get("hidden", [])
    with quiet_libraries():
        tokenizer = find_tokenizer(arguments.teacher)
        data = _tokenized(dataset_of(arguments), tokenizer, arguments)
        return TeacherCache.build(
            arguments.teacher,
            data,
            arguments.folder,
            task=arguments.task,
            processing_class=tokenizer,
            batch_size=arguments.batch_size,
            store=None if arguments.no_predictions else store_of(arguments),
            objectives=KeepActivations(*(("hidden", block) for block in hidden)) if hidden else None,
            options=BuildOptions(
                predictions=not arguments.no_predictions,
                activation_dtype=arguments.activation_dtype,
                teacher_dtype=arguments.teacher_dtype,
                num_workers=arguments.workers,
                announce=lambda text: console.print(text, highlight=False),
            ),
        )


def _show(arguments: argparse.Namespace) -> None:
    from hf_distill.teachers import TeacherCache

    cache, console = TeacherCache(arguments.folder), Console()
    manifest, kept, more = cache.manifest, cache.activations.kept, []
    if kept:
        more.append(f"activations: {', '.join(map(str, kept))}, {manifest['activations']['dtype']}")
    if manifest["augmentation"] is not None:
        more.append(f"versions of each example: {manifest['augmentation']['views']}")
    if cache.temperature is not None:
        more.append(f"predictions are for temperature {cache.temperature:g} only")
    for line in (
        f"{cache!r}, every checksum is right",
        f"teacher: {manifest['teacher']['class']}, weights {manifest['teacher']['weights']}",
        f"head: {manifest['task']['kind']}, {manifest['predictions']['columns']} columns",
        f"kept of each row: {', '.join(f'{name} {value}' for name, value in manifest['store'].items())}",
        f"keyed by: {', '.join(manifest['inputs']['columns'])}",
        f"rows of predictions: {manifest['positions']:,}",
        *more,
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
