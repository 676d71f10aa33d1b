"""Routing Replay: expert choices as data (trace), as a protocol (replay), and one adapter a backend."""
