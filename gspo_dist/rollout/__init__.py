"""Rollout engines: they sample completions, say how likely they were, and take new weights."""
