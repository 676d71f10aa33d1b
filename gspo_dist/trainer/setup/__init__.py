"""From a configuration to a run: checks, factories, processes, the run folder."""
