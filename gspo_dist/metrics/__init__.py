"""Where numbers go: sinks (files, console, W&B), curves, heat maps, and what every key means."""
