"""Where numbers go: sinks (console, jsonl, W&B), curves and heat maps."""
