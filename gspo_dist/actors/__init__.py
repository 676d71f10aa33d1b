"""Ray actors: learner ranks, rollout engines and reward workers as processes. The only package that imports ray."""
