"""Learners own the trainable weights: one protocol (learner), one reference (eager), two for scale."""
