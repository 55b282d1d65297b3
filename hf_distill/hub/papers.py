"""Each divergence in one formula, and the papers to cite. Computes nothing."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """What a citation needs. `venue` is a journal, a conference or a preprint number."""

    key: str
    authors: str
    title: str
    venue: str
    year: int
    url: str

    def bibtex(self) -> str:
        """The BibTeX entry."""
        fields = {
            "author": self.authors,
            "title": "{" + self.title + "}",
            "howpublished": self.venue,
            "year": str(self.year),
            "url": self.url,
        }
        lines = [f"  {name:<12} = {{{text}}}," for name, text in fields.items()]
        return "\n".join([f"@misc{{{self.key},", *lines, "}"])


class Divergence(NamedTuple):
    """A divergence as the card shows it: p is the teacher's distribution, q the student's."""

    formula: str
    paper: Paper


HINTON = Paper(
    "hinton2015distilling",
    "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
    "Distilling the Knowledge in a Neural Network",
    "arXiv:1503.02531",
    2015,
    "https://arxiv.org/abs/1503.02531",
)
_MINILLM = Paper(
    "gu2024minillm",
    "Gu, Yuxian and Dong, Li and Wei, Furu and Huang, Minlie",
    "MiniLLM: Knowledge Distillation of Large Language Models",
    "ICLR 2024, arXiv:2306.08543",
    2024,
    "https://arxiv.org/abs/2306.08543",
)
_GKD = Paper(
    "agarwal2024onpolicy",
    "Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and "
    "Ramos, Sabela and Geist, Matthieu and Bachem, Olivier",
    "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    "ICLR 2024, arXiv:2306.13649",
    2024,
    "https://arxiv.org/abs/2306.13649",
)
_DISTILLM = Paper(
    "ko2024distillm",
    "Ko, Jongwoo and Kim, Sungnyun and Chen, Tianyi and Yun, Se-Young",
    "DistiLLM: Towards Streamlined Distillation for Large Language Models",
    "ICML 2024, arXiv:2402.03898",
    2024,
    "https://arxiv.org/abs/2402.03898",
)
_F_DISTILL = Paper(
    "wen2023fdivergence",
    "Wen, Yuqiao and Li, Zichao and Du, Wenyu and Mou, Lili",
    "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
    "ACL 2023, arXiv:2307.15190",
    2023,
    "https://arxiv.org/abs/2307.15190",
)
_BA = Paper(
    "ba2014deep",
    "Ba, Lei Jimmy and Caruana, Rich",
    "Do Deep Nets Really Need to be Deep?",
    "NeurIPS 2014, arXiv:1312.6184",
    2014,
    "https://arxiv.org/abs/1312.6184",
)
_DIST = Paper(
    "huang2022dist",
    "Huang, Tao and You, Shan and Wang, Fei and Qian, Chen and Xu, Chang",
    "Knowledge Distillation from A Stronger Teacher",
    "NeurIPS 2022, arXiv:2205.10536",
    2022,
    "https://arxiv.org/abs/2205.10536",
)
_DKD = Paper(
    "zhao2022decoupled",
    "Zhao, Borui and Cui, Quan and Song, Renjie and Qiu, Yiyu and Liang, Jiajun",
    "Decoupled Knowledge Distillation",
    "CVPR 2022, arXiv:2203.08679",
    2022,
    "https://arxiv.org/abs/2203.08679",
)
_R_DROP = Paper(
    "liang2021rdrop",
    "Liang, Xiaobo and Wu, Lijun and Li, Juntao and Wang, Yue and Meng, Qi and Qin, Tao and Chen, Wei and Zhang, Min "
    "and Liu, Tie-Yan",
    "R-Drop: Regularized Dropout for Neural Networks",
    "NeurIPS 2021, arXiv:2106.14448",
    2021,
    "https://arxiv.org/abs/2106.14448",
)
_DEIT = Paper(
    "touvron2021deit",
    "Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and Massa, Francisco and "
    "Sablayrolles, Alexandre and Jegou, Herve",
    "Training data-efficient image transformers & distillation through attention",
    "ICML 2021, arXiv:2012.12877",
    2021,
    "https://arxiv.org/abs/2012.12877",
)

DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence("KL(p ‖ q)", HINTON),
    "reverse_kl": Divergence("KL(q ‖ p)", _MINILLM),
    "jeffreys": Divergence("KL(p ‖ q) + KL(q ‖ p)", _R_DROP),
    "jensen_shannon": Divergence("β KL(p ‖ m) + (1 - β) KL(q ‖ m), where m = β p + (1 - β) q", _GKD),
    "skewed_forward_kl": Divergence("KL(p ‖ skew p + (1 - skew) q)", _DISTILLM),
    "skewed_reverse_kl": Divergence("KL(q ‖ skew q + (1 - skew) p)", _DISTILLM),
    "total_variation": Divergence("half the L1 distance of p and q", _F_DISTILL),
    "mean_squared_error": Divergence("the mean squared difference of the raw outputs", _BA),
    "dist": Divergence("1 - Pearson correlation of p and q, along rows and columns", _DIST),
    "decoupled": Divergence("target_weight KL(target or not) + others_weight KL(among the others), both p ‖ q", _DKD),
    "hard": Divergence("-log q(argmax p)", _DEIT),
}

_DISTILBERT = Paper(
    "sanh2019distilbert",
    "Sanh, Victor and Debut, Lysandre and Chaumond, Julien and Wolf, Thomas",
    "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
    "arXiv:1910.01108",
    2019,
    "https://arxiv.org/abs/1910.01108",
)
_TINYBERT = Paper(
    "jiao2020tinybert",
    "Jiao, Xiaoqi and Yin, Yichun and Shang, Lifeng and Jiang, Xin and Chen, Xiao and Li, Linlin and Wang, Fang and "
    "Liu, Qun",
    "TinyBERT: Distilling BERT for Natural Language Understanding",
    "Findings of EMNLP 2020, arXiv:1909.10351",
    2020,
    "https://arxiv.org/abs/1909.10351",
)
_MINILMV2 = Paper(
    "wang2021minilmv2",
    "Wang, Wenhui and Bao, Hangbo and Huang, Shaohan and Dong, Li and Wei, Furu",
    "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers",
    "Findings of ACL 2021, arXiv:2012.15828",
    2021,
    "https://arxiv.org/abs/2012.15828",
)
_FITNETS = Paper(
    "romero2015fitnets",
    "Romero, Adriana and Ballas, Nicolas and Kahou, Samira Ebrahimi and Chassang, Antoine and Gatta, Carlo and "
    "Bengio, Yoshua",
    "FitNets: Hints for Thin Deep Nets",
    "ICLR 2015, arXiv:1412.6550",
    2015,
    "https://arxiv.org/abs/1412.6550",
)
_SIMILARITY = Paper(
    "tung2019similarity",
    "Tung, Frederick and Mori, Greg",
    "Similarity-Preserving Knowledge Distillation",
    "ICCV 2019, arXiv:1907.09682",
    2019,
    "https://arxiv.org/abs/1907.09682",
)
_UNIVERSAL = Paper(
    "boizard2024universal",
    "Boizard, Nicolas and El Haddad, Kevin and Hudelot, C{\\'e}line and Colombo, Pierre",
    "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    "arXiv:2402.12030",
    2024,
    "https://arxiv.org/abs/2402.12030",
)

_BE_YOUR_OWN_TEACHER = Paper(
    "zhang2019byot",
    "Zhang, Linfeng and Song, Jiebo and Gao, Anni and Chen, Jingwei and Bao, Chenglong and Ma, Kaisheng",
    "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self Distillation",
    "ICCV 2019, arXiv:1905.08094",
    2019,
    "https://arxiv.org/abs/1905.08094",
)
_MEAN_TEACHER = Paper(
    "tarvainen2017meanteacher",
    "Tarvainen, Antti and Valpola, Harri",
    "Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep learning "
    "results",
    "NeurIPS 2017, arXiv:1703.01780",
    2017,
    "https://arxiv.org/abs/1703.01780",
)
_TEMPORAL = Paper(
    "laine2017temporal",
    "Laine, Samuli and Aila, Timo",
    "Temporal Ensembling for Semi-Supervised Learning",
    "ICLR 2017, arXiv:1610.02242",
    2017,
    "https://arxiv.org/abs/1610.02242",
)
_SNAPSHOT = Paper(
    "yang2019snapshot",
    "Yang, Chenglin and Xie, Lingxi and Su, Chi and Yuille, Alan L.",
    "Snapshot Distillation: Teacher-Student Optimization in One Generation",
    "CVPR 2019, arXiv:1812.00123",
    2019,
    "https://arxiv.org/abs/1812.00123",
)
_MUTUAL = Paper(
    "zhang2018mutual",
    "Zhang, Ying and Xiang, Tao and Hospedales, Timothy M. and Lu, Huchuan",
    "Deep Mutual Learning",
    "CVPR 2018, arXiv:1706.00384",
    2018,
    "https://arxiv.org/abs/1706.00384",
)

# By the class of a teacher that is a method of its own.
TEACHERS: dict[str, Paper] = {
    "MovingAverage": _MEAN_TEACHER,
    "Peer": _MUTUAL,
    "RDropTeacher": _R_DROP,
    "Snapshot": _SNAPSHOT,
    "TemporalEnsemble": _TEMPORAL,
}

# By the class of an objective, as its settings begin.
OBJECTIVES: dict[str, Paper] = {
    "HiddenMatch": _FITNETS,
    "CosineEmbedding": _DISTILBERT,
    "AttentionMatch": _TINYBERT,
    "RelationMatch": _MINILMV2,
    "SimilarityMatch": _SIMILARITY,
    "ExitMatch": _BE_YOUR_OWN_TEACHER,
    "UniversalLogitMatch": _UNIVERSAL,
}
