"""Comparisons: arms times seeds under equal data and updates, and the report of what they show."""
