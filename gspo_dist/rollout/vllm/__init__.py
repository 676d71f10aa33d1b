"""vLLM behind the rollout engine protocol, and what it loads into its own processes."""
