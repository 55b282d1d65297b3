"""The model card of a distilled student, from the facts of its run. Uploading is the trainer's."""

from hf_distill.hub.card import render_card, write_card

__all__ = ["render_card", "write_card"]
