"""Commands of `mka` that need the orchestrator: one command, one file."""
