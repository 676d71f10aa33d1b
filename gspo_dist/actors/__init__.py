"""Ray actors: learner ranks, rollout engines and reward workers as processes. Only this package imports ray.

A dead engine or reward worker is replaced here, and its work goes to the others. When a learner rank dies,
whatever call waits for it raises `process.ProcessDied`, with the actor's name and the last lines of its log.
The run then goes on from its newest checkpoint (trainer/restarts.py).
"""
