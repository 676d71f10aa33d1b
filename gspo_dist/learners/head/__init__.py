"""Log-probs of the trained tokens from hidden states, without ever holding all logits."""
