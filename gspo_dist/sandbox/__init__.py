"""Running programs that a model wrote, without trusting them: protocol.py first, README.md for what holds."""
