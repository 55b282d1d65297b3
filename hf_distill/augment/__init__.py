"""Augmented inputs for student and teacher, and batches continued by the student."""

from hf_distill.augment.augmentation import Augmentation
from hf_distill.augment.collator import AugmentingCollator
from hf_distill.augment.offline import augment_dataset
from hf_distill.augment.on_policy import OnPolicy
from hf_distill.augment.sound import Noise, SpecAugment
from hf_distill.augment.words import WordReplacement

__all__ = [
    "Augmentation",
    "AugmentingCollator",
    "Noise",
    "OnPolicy",
    "SpecAugment",
    "WordReplacement",
    "augment_dataset",
]
