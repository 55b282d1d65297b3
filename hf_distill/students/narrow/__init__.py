"""A thinner student of the teacher's architecture: fewer heads, neurons, channels, tokens."""

from hf_distill.students.narrow.narrow import narrow

__all__ = ["narrow"]
