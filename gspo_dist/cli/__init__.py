"""The command `gspo`: one file per command, and the only room that knows hydra and omegaconf.

    main.py      usage, and which file answers which command
    exits.py     how a command ends: messages and exit statuses
    compose.py   hydra: the schema, composing a configuration, running a task as a hydra application
    explain.py   what is wrong with an override, in gspo's words instead of hydra's

Every other file is a command with a `main(arguments)`. It imports what it needs when it runs.
"""
