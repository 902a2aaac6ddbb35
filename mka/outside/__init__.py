"""What comes from outside: files read within bounds, text made fit to be shown."""
