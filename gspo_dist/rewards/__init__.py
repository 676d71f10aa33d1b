"""How a completion is judged: pure functions of (prompt, completion)."""
