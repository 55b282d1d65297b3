"""The student as its own teacher: as it was, on average, once more, without adapters; and a peer that learns along."""

from hf_distill.teachers.own.copies import MovingAverage, Snapshot
from hf_distill.teachers.own.in_place import AdaptersOff, SecondPass
from hf_distill.teachers.own.peer import Peer
from hf_distill.teachers.own.temporal import TemporalEnsemble

__all__ = ["AdaptersOff", "MovingAverage", "Peer", "SecondPass", "Snapshot", "TemporalEnsemble"]
