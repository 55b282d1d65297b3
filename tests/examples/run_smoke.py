"""Run the named examples with `--help`, then with `--smoke`, all in one process.

One process, because importing torch and transformers takes longer than any example. Each example gets a folder
below the working folder, with `help.txt`, `smoke.txt` (its output) and its saved files.
"""

import contextlib
import os
import runpy
import sys
from pathlib import Path


def main(scripts: list[Path]) -> None:
    """Stop with a traceback at the first failure."""
    top = Path.cwd()
    for script in scripts:
        folder = top / script.stem
        folder.mkdir()
        os.chdir(folder)
        with contextlib.suppress(SystemExit):  # raised by argparse after --help
            run(script, ["--help"], folder / "help.txt")
        baseline = ["--baseline"] if script.stem == "text_classification" else []
        run(script, ["--smoke", "--output_dir", "student", *baseline], folder / "smoke.txt")


def run(script: Path, arguments: list[str], printed: Path) -> None:
    """Do what `python script.py ARGUMENTS` does: the script's folder comes first on the path."""
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    with printed.open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(script), run_name="__main__")
    sys.path.pop(0)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
