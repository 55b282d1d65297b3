"""`hf-distill complete`: let a teacher answer the prompts of a dataset. The work is `generate_completions`'s."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_distill.cli.dataset import add_dataset_arguments, dataset_of, resumable


def add_command(commands: Any) -> None:
    """Add `complete` to the subcommands of a parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "complete",
        help="let a teacher answer the prompts of a dataset, to train a student on its texts",
        description="Writes a folder of what a teacher answers to every prompt of a dataset: an ordinary dataset, for "
        "sequence-level distillation. A run that is interrupted goes on when the same command is given again. For "
        "several processes: accelerate launch -m hf_distill.cli.main complete ...",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("teacher", metavar="TEACHER", help="folder or Hub id of a model that writes text")
    add_dataset_arguments(parser)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to fill")
    parser.add_argument("--prompt-column", default="prompt", help="texts, or lists of messages")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="the longest answer")
    parser.add_argument("--beams", type=int, default=1, help="width of the beam search")
    parser.add_argument("--sample", action="store_true", help="draw the tokens, instead of the likeliest")
    parser.add_argument("--sampling-temperature", type=float, default=1.0, help="with --sample")
    parser.add_argument("--answers", type=int, default=1, help="for each prompt, with --sample or --beams")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at once")
    parser.add_argument("--seed", type=int, default=0, help="with --sample: another seed, other answers")
    parser.set_defaults(run=_complete)


def _complete(arguments: argparse.Namespace) -> None:
    console = Console()
    with resumable(console, arguments.folder, counted="rows", noun="answers"):
        made = _made(arguments)
    console.print(f"{len(made):,} answers in {arguments.folder}", highlight=False)
    console.print("To train on them: datasets.load_from_disk(folder)", highlight=False)


def _made(arguments: argparse.Namespace) -> Any:
    from hf_distill.cli.progress import quiet_libraries
    from hf_distill.teachers.completions import generate_completions

    with quiet_libraries():
        return generate_completions(
            arguments.teacher,
            dataset_of(arguments),
            arguments.folder,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=arguments.sample,
            sampling_temperature=arguments.sampling_temperature,
            num_return_sequences=arguments.answers,
            generation={"num_beams": arguments.beams},
            prompt_column=arguments.prompt_column,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
        )
