"""Render the example cards from recorded facts of real runs.

python model_cards/render_examples.py            # facts -> Markdown
python model_cards/render_examples.py --check    # fails if a card is stale
python model_cards/render_examples.py --record   # run the quickstart (minutes), keep its facts
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from hf_distill.hub import render_card, write_card
from hf_distill.hub.facts import CardData

HERE = Path(__file__).resolve().parent
RECORDED = HERE / "quickstart-student.facts.json"


def render(facts_file: Path) -> str:
    """Return the card of recorded facts."""
    return render_card(CardData.from_json(facts_file.read_text(encoding="utf-8")))


def stale(folder: Path = HERE) -> list[str]:
    """Return the names of the cards that differ from what their facts render to."""
    found = []
    for facts_file in sorted(folder.glob("*.facts.json")):
        card = _card_of(facts_file)
        if not card.is_file() or card.read_text(encoding="utf-8") != render(facts_file):
            found.append(card.name)
    return found


def _card_of(facts_file: Path) -> Path:
    return facts_file.with_name(facts_file.name.replace(".facts.json", ".md"))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)


def record() -> None:
    """Run the quickstart and keep the facts of the distilled student."""
    from hf_distill.cli.main import main as command
    from hf_distill.trainer import publishing

    def keep(facts: CardData, output_dir: str) -> None:
        _write(RECORDED, facts.to_json())
        write_card(facts, output_dir)

    publishing.write_model_card = keep  # type: ignore[assignment]  # for this run only
    with tempfile.TemporaryDirectory() as folder:
        code = command(["quickstart", "--output-dir", os.path.join(folder, "quickstart")])
    if code != 0:
        sys.exit(code)


def main() -> None:
    """Render, check or record, as the command line asks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a card is stale")
    parser.add_argument("--record", action="store_true", help="run the quickstart first, keep its facts")
    options = parser.parse_args()
    if options.record:
        record()
    if options.check:
        if names := stale():
            sys.exit(f"stale: {', '.join(names)}. Run: python model_cards/render_examples.py")
        return
    for facts_file in sorted(HERE.glob("*.facts.json")):
        _write(_card_of(facts_file), render(facts_file))
        print(_card_of(facts_file).name)


if __name__ == "__main__":
    main()
