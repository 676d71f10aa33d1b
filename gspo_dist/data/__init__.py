"""Prompts: where they come from, how they are rendered, and the cursor that hands them out."""
