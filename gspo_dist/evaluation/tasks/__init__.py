"""The suites: what is published, how it is asked, how it is graded. `table.py` is their list."""
