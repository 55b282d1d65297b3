"""The labels' and the teacher's terms from hidden states and output heads, without whole logits."""
