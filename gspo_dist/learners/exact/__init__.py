"""The learner's forward with the engine's own operators: the same log-probs, bit for bit."""
