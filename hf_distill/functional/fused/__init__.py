"""The labels' and the teacher's terms from hidden states and output heads, computed in chunks without whole logits."""
