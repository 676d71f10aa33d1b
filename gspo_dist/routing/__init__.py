"""Routing Replay: expert choices as data, their bookkeeping, and one adapter per backend."""
