"""The options of `hf-distill cache build` that say what is kept of each row of predictions, and the store they mean."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from hf_distill.errors import SettingError

if TYPE_CHECKING:
    from hf_distill.teachers.cached import Dense, Hybrid, Sampled, TopK

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
    from hf_distill.teachers.cached import Dense, Hybrid, Sampled, TopK

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
