"""Ray actors: learner ranks, rollout engines and reward workers as processes. Only this package imports ray.

When an actor dies, whatever call waits for it raises `process.ProcessDied`, with the actor's name and
the last lines of its log. Nothing is restarted here: the run ends, and `gspo train` continues from
the newest checkpoint.
"""
