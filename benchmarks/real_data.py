"""Student distilled beside student alone, at equal steps, on real data: SST-2, WNUT-17, FSDD. Quality, not speed."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when run as a script

from benchmarks import protocol
from benchmarks.places import data_folder, encoder_folder


def main() -> None:
    """Read the command line, run one data set, print its table."""
    options = parse()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = data_folder(options.data_dir, options.set)
    steps: dict[str, Any] = {
        name: value for name in ("teacher_steps", "student_steps") if (value := getattr(options, name)) is not None
    }
    data_set = importlib.import_module(f"benchmarks.sets.{options.set}")  # only this one's libraries are needed
    if options.set != "fsdd":
        steps["encoder"] = encoder_folder(options.encoder)
    case = data_set.load(folder, **steps)
    case = dataclasses.replace(case, alone=case.alone[: options.tries], distilled=case.distilled[: options.tries])
    found = protocol.run(case, seeds=options.seeds, folder=options.work_dir, say=lambda line: print(line, flush=True))
    found["machine"] = {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    if options.output:
        beside = options.output.with_name(f".{options.output.name}.partial")
        beside.write_text(json.dumps(found, indent=1), encoding="utf-8")
        os.replace(beside, options.output)
    print(f"\n{protocol.markdown(found)}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", choices=("sst2", "wnut17", "fsdd"), help="which data set")
    parser.add_argument("--data-dir", help="folder with sst2/, wnut17/ and fsdd/; or $HF_DISTILL_DATA")
    parser.add_argument("--encoder", help="folder of a pretrained BERT encoder (default: the installed MiniLM package)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first chooses the settings")
    parser.add_argument("--teacher-steps", type=int, help="optimizer steps of the teacher")
    parser.add_argument("--student-steps", type=int, help="optimizer steps of each student")
    parser.add_argument("--work-dir", type=Path, help="keeps finished trainings; a run that was cut off goes on")
    parser.add_argument(
        "--tries", type=int, help="settings of a student that are tried with the first seed; default: all"
    )
    parser.add_argument("--output", type=Path, help="JSON file for every number that was measured")
    return parser.parse_args()


if __name__ == "__main__":
    main()
