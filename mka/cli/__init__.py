"""The command line: one command, one file; options come from the sections of the recipe."""
