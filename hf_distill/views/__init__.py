"""What the models are shown: the batch, or an augmented version of it."""

from hf_distill.views.collator import AugmentingCollator
from hf_distill.views.noise import Noise
from hf_distill.views.offline import augment_dataset
from hf_distill.views.on_policy import OnPolicy
from hf_distill.views.replacement import WordReplacement
from hf_distill.views.seam import Augmentation
from hf_distill.views.spec_augment import SpecAugment

__all__ = [
    "Augmentation",
    "AugmentingCollator",
    "Noise",
    "OnPolicy",
    "SpecAugment",
    "WordReplacement",
    "augment_dataset",
]
