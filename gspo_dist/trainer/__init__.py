"""The trainer: one readable step (loop), what it collects, the contract of the log-probs, the
checked weight sync.
"""
