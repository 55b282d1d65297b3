"""The formula of each divergence, and the papers that a card cites. The BibTeX entries are in `papers.bib`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_ENTRIES = Path(__file__).with_name("papers.bib").read_text(encoding="utf-8").strip().split("\n\n")
BIBTEX: dict[str, str] = {re.findall(r"@\w+{(.+),", entry)[0]: entry for entry in _ENTRIES}
"""The BibTeX entry for each citation key."""

DISTILLATION = "hinton2015distilling"


class Divergence(NamedTuple):
    """A divergence on the card: p is the teacher's distribution, q the student's.

    Attributes:
        formula: the divergence in symbols.
        paper: the citation key of the paper that introduced it for distillation.
    """

    formula: str
    paper: str


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence("KL(p ‖ q)", DISTILLATION),
    "reverse_kl": Divergence("KL(q ‖ p)", "gu2024minillm"),
    "jeffreys": Divergence("KL(p ‖ q) + KL(q ‖ p)", "liang2021rdrop"),
    "jensen_shannon": Divergence("β KL(p ‖ m) + (1 - β) KL(q ‖ m), where m = β p + (1 - β) q", "agarwal2024onpolicy"),
    "skewed_forward_kl": Divergence("KL(p ‖ skew p + (1 - skew) q)", "ko2024distillm"),
    "skewed_reverse_kl": Divergence("KL(q ‖ skew q + (1 - skew) p)", "ko2024distillm"),
    "total_variation": Divergence("half the L1 distance of p and q", "wen2023fdivergence"),
    "mean_squared_error": Divergence("the mean squared difference of the raw outputs", "ba2014deep"),
    "dist": Divergence("1 - Pearson correlation of p and q, along rows and columns", "huang2022dist"),
    "decoupled": Divergence(
        "target_weight KL(target or not) + others_weight KL(among the others), both p ‖ q", "zhao2022decoupled"
    ),
    "hard": Divergence("-log q(argmax p)", "touvron2021deit"),
}

TEACHERS = {
    "MovingAverage": "tarvainen2017meanteacher",
    "Peer": "zhang2018mutual",
    "RDropTeacher": "liang2021rdrop",
    "Snapshot": "yang2019snapshot",
    "TemporalEnsemble": "laine2017temporal",
}
"""The citation keys of self-distillation methods, by the class name of the teacher."""

OBJECTIVES = {
    "HiddenMatch": "romero2015fitnets",
    "CosineEmbedding": "sanh2019distilbert",
    "AttentionMatch": "jiao2020tinybert",
    "RelationMatch": "wang2021minilmv2",
    "SimilarityMatch": "tung2019similarity",
    "ExitMatch": "zhang2019byot",
    "UniversalLogitMatch": "boizard2024universal",
}
"""The citation keys of objectives, by class name."""
