"""Rollout engines: what samples completions and says how likely they were."""
