"""The BibTeX entries of `papers.bib`, by citation key. The `paper` of a class or a divergence is such a key."""

from __future__ import annotations

import re
from pathlib import Path

_ENTRIES = Path(__file__).with_name("papers.bib").read_text(encoding="utf-8").strip().split("\n\n")
BIBTEX: dict[str, str] = {re.findall(r"@\w+{(.+),", entry)[0]: entry for entry in _ENTRIES}

DISTILLATION = "hinton2015distilling"
