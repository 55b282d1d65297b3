"""What a distilled student takes to the Hub: its model card. Uploads nothing itself."""

from hf_distill.hub.card import render_card, write_card

__all__ = ["render_card", "write_card"]
