"""The command `gspo`: composing a configuration, and one function per subcommand."""
