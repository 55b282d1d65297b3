"""`hf-distill complete`: let a teacher write completions of a dataset's prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_distill.cli.dataset import HelpFormatter, add_dataset_arguments, load_dataset, resumable


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `complete` to the subcommands of a parser."""
    parser = commands.add_parser(
        "complete",
        help="let a teacher answer the prompts of a dataset, to train a student on its texts",
        description="Writes a folder with a teacher's answers to every prompt of a dataset: an ordinary dataset, for "
        "sequence-level distillation. To continue an interrupted run, give the same command again. For several "
        "processes: accelerate launch -m hf_distill.cli.main complete ...",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("teacher", metavar="TEACHER", help="folder or Hub id of a model that generates text")
    add_dataset_arguments(parser)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to fill")
    parser.add_argument("--prompt-column", default="prompt", help="column with texts, or lists of messages")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="maximum tokens of an answer")
    parser.add_argument("--beams", type=int, default=1, help="width of the beam search")
    parser.add_argument("--sample", action="store_true", help="draw tokens, instead of taking the most probable")
    parser.add_argument("--sampling-temperature", type=float, default=1.0, help="with --sample")
    parser.add_argument("--answers", type=int, default=1, help="for each prompt, with --sample or --beams")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts in a batch")
    parser.add_argument("--seed", type=int, default=0, help="with --sample: another seed gives other answers")
    parser.set_defaults(run=_complete)


def _complete(arguments: argparse.Namespace) -> None:
    from hf_distill.cli.progress import quiet_libraries
    from hf_distill.teachers.completions import generate_completions

    console = Console()
    with resumable(console, arguments.folder, counted="rows", noun="answers"), quiet_libraries():
        answers = generate_completions(
            arguments.teacher,
            load_dataset(arguments),
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
    console.print(f"{len(answers):,} answers in {arguments.folder}", highlight=False)
    console.print("To train on them: datasets.load_from_disk(folder)", highlight=False)
