"""`hf-distill cache`: store a teacher's predictions for a dataset, or show what a cache holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hf_distill.cli.dataset import HelpFormatter, add_dataset_arguments, load_dataset, resumable
from hf_distill.errors import SettingError

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_distill.teachers import TeacherCache
    from hf_distill.teachers.cache import Dense, Hybrid, Sampled, TopK

# Copies of the library's lists, whose import would delay the help by seconds; tests/cli/test_quick.py compares them.
_TASKS = (
    *("causal_lm", "classification", "ctc", "embedding", "masked_lm", "multiple_choice", "regression", "seq2seq"),
    *("span", "token_classification"),
)
_TEACHER_DTYPES = ("auto", "float32", "bfloat16", "float16")
_ACTIVATION_DTYPES = ("float16", "bfloat16", "float32")
_INPUTS = ("input_ids", "input_values", "input_features", "pixel_values")

# The options of each store.
_STORES: dict[str, tuple[str, ...]] = {
    "dense": ("store_dtype",),
    "top_k": ("top_k", "temperature", "store_dtype"),
    "sampled": ("samples", "temperature", "proposal_power", "seed"),
    "hybrid": ("top_k", "samples", "temperature", "store_dtype", "seed"),
}


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `cache` to the subcommands of a parser."""
    parser = commands.add_parser(
        "cache",
        help="store a teacher's predictions for a dataset, so that training does not run the teacher",
        description="Builds a folder with a teacher's predictions for every example of a dataset, or shows what such a "
        "folder holds. To continue an interrupted build, give the same command again. For several processes: "
        "accelerate launch -m hf_distill.cli.main cache build ...",
    )
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    _add_build(kinds)
    show = kinds.add_parser("show", help="check the files of a cache, and show what it holds")
    show.add_argument("folder", type=Path, metavar="CACHE", help="a folder that `cache build` filled")
    show.set_defaults(run=_show)


def _add_build(kinds: argparse._SubParsersAction[Any]) -> None:
    build = kinds.add_parser("build", help="run the teacher on every example", formatter_class=HelpFormatter)
    build.add_argument("teacher", metavar="TEACHER", help="folder or Hub id of the model")
    add_dataset_arguments(build)
    build.add_argument("folder", type=Path, metavar="CACHE", help="the folder to fill")
    build.add_argument("--task", choices=_TASKS, help="the kind of head; default: that of the checkpoint")
    build.add_argument("--text-column", help="the text to tokenize, if the dataset is not tokenized")
    build.add_argument("--text-pair-column", help="the second text of each example")
    build.add_argument("--max-length", type=int, help="maximum tokens of an example; default: the tokenizer's")
    build.add_argument("--batch-size", type=int, default=32, help="examples in a forward")
    add_store_options(build)
    build.add_argument(
        "--hidden",
        type=int,
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="BLOCK",
        help="also store the hidden states of these blocks, counted from 0, for objectives that match them; "
        "-1 is the embeddings",
    )
    build.add_argument(
        "--activation-dtype", choices=_ACTIVATION_DTYPES, default="float16", help="dtype of stored hidden states"
    )
    build.add_argument(
        "--no-predictions", action="store_true", help="with --hidden: store only hidden states, to train at alpha=None"
    )
    build.add_argument(
        "--teacher-dtype", choices=_TEACHER_DTYPES, help="dtype of the teacher; default: that of the checkpoint"
    )
    build.add_argument("--workers", type=int, default=0, help="processes that make batches")
    build.set_defaults(run=_build)


def add_store_options(build: argparse.ArgumentParser) -> None:
    """Add the options of the stores to a parser; options that are not given are not among the arguments."""
    options: dict[str, dict[str, Any]] = {
        "--store": {
            "choices": tuple(_STORES),
            "help": "what to store of each row of predictions: all columns; the most probable columns and the sum of "
            "the others; columns drawn by their probability; or the most probable and draws from the others. "
            "Default: dense, or top_k with --top-k or for more than 4,096 columns",
        },
        "--top-k": {"type": int, "help": "number of most probable columns, with top_k (64) and hybrid (16)"},
        "--samples": {"type": int, "help": "number of drawn columns, with sampled (32) and hybrid (16)"},
        "--temperature": {
            "type": float,
            "nargs": "+",
            "help": "of the training: one or several with top_k (1 and 2), one with sampled and hybrid (1)",
        },
        "--proposal-power": {"type": float, "help": "with sampled: draw in proportion to p to this power (1)"},
        "--seed": {"type": int, "help": "of the draws, with sampled and hybrid (0)"},
        "--store-dtype": {
            "choices": ("float16", "bfloat16", "float32"),
            "help": "dtype of stored logits or log-probabilities (float16)",
        },
    }
    for name, keywords in options.items():
        build.add_argument(name, default=argparse.SUPPRESS, **keywords)


def store_of(arguments: argparse.Namespace) -> Dense | TopK | Sampled | Hybrid | None:
    """Return the store that the options describe, or None without options, so that the head determines it.

    Raises:
        SettingError: if the store does not have an option, or does not take a value.
    """
    every = {option for options in _STORES.values() for option in options}
    given = {option: value for option, value in vars(arguments).items() if option in every}
    if not given and "store" not in arguments:
        return None
    name: str = vars(arguments).get("store", "top_k" if "top_k" in given else "dense")
    for option in given:
        if option not in _STORES[name]:
            having = ", ".join(store for store, options in _STORES.items() if option in options)
            raise SettingError(
                f"--{option.replace('_', '-')} is not an option of --store {name}. It is one of --store {having}."
            )
    renamed = {"top_k": "k", "store_dtype": "dtype"}
    settings = {renamed.get(option, option): value for option, value in given.items()}
    temperatures = settings.pop("temperature", None)
    if temperatures is not None and name == "top_k":
        settings["temperatures"] = tuple(temperatures)
    elif temperatures is not None:
        if len(temperatures) > 1:
            raise SettingError(
                f"--temperature {' '.join(f'{t:g}' for t in temperatures)}: with --store {name} give one temperature, "
                "that of the training."
            )
        settings["temperature"] = temperatures[0]
    return _make_store(name, settings)


def _make_store(name: str, settings: dict[str, Any]) -> Dense | TopK | Sampled | Hybrid:
    from hf_distill.teachers.cache import Dense, Hybrid, Sampled, TopK

    stores: dict[str, type[Dense | TopK | Sampled | Hybrid]] = {
        "dense": Dense,
        "top_k": TopK,
        "sampled": Sampled,
        "hybrid": Hybrid,
    }
    return stores[name](**settings)


def _build(arguments: argparse.Namespace) -> None:
    console = Console()
    with resumable(console, arguments.folder, counted="examples", noun="examples"):
        cache = _build_cache(arguments, console)
    console.print(f"{cache!r} in {arguments.folder}", highlight=False)
    console.print("To train with it: DistillationTrainer(teacher_model=CachedTeacher(folder), ...)", highlight=False)


def _build_cache(arguments: argparse.Namespace, console: Console) -> TeacherCache:
    from hf_distill.cli.progress import quiet_libraries
    from hf_distill.teachers import BuildOptions, KeepActivations, TeacherCache
    from hf_distill.teachers.load import find_tokenizer

    hidden = [("hidden", block) for block in vars(arguments).get("hidden", ())]
    with quiet_libraries():
        tokenizer = find_tokenizer(arguments.teacher)
        return TeacherCache.build(
            arguments.teacher,
            _tokenized(load_dataset(arguments), tokenizer, arguments),
            arguments.folder,
            task=arguments.task,
            processing_class=tokenizer,
            batch_size=arguments.batch_size,
            store=None if arguments.no_predictions else store_of(arguments),
            objectives=KeepActivations(*hidden) if hidden else None,
            options=BuildOptions(
                predictions=not arguments.no_predictions,
                activation_dtype=arguments.activation_dtype,
                teacher_dtype=arguments.teacher_dtype,
                num_workers=arguments.workers,
                announce=lambda text: console.print(text, highlight=False),
            ),
        )


def _tokenized(data: Dataset, tokenizer: Any, arguments: argparse.Namespace) -> Dataset:
    """Return the dataset with model inputs: as it is if it has some, else tokenized by the teacher's tokenizer."""
    columns = ", ".join(data.column_names)
    if arguments.text_column is None:
        if not set(_INPUTS) & set(data.column_names):
            raise SettingError(
                f"the dataset has the columns {columns}, and no model input ({', '.join(_INPUTS)}). Name the column "
                "with the text: --text-column."
            )
        return data
    wanted = [name for name in (arguments.text_column, arguments.text_pair_column) if name is not None]
    missing = [name for name in wanted if name not in data.column_names]
    if missing:
        raise SettingError(f"--text-column: there is no column {', '.join(missing)}. The dataset has {columns}.")
    if tokenizer is None:
        raise SettingError(
            f"--text-column: there is no tokenizer in {arguments.teacher!r}. Save it there, or tokenize the dataset."
        )
    return data.map(
        lambda rows: tokenizer(*(rows[name] for name in wanted), truncation=True, max_length=arguments.max_length),
        batched=True,
        desc=None,
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
        f"{cache!r}, all checksums match",
        f"teacher: {manifest['teacher']['class']}, weights {manifest['teacher']['weights']}",
        f"head: {manifest['task']['kind']}, {manifest['predictions']['columns']} columns",
        f"stored for each row: {', '.join(f'{name} {value}' for name, value in manifest['store'].items())}",
        f"key columns: {', '.join(manifest['inputs']['columns'])}",
        f"rows of predictions: {manifest['positions']:,}",
        *more,
        f"files: {len(manifest['shards'])} shards, built with "
        + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
    ):
        console.print(line, highlight=False)
