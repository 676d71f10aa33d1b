"""What a model is, read from its folder: its sizes, its layers, the scales of its head.

Standard library only.
"""
