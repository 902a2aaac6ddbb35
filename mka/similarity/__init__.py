"""The arithmetic of likeness: numpy and scipy alone."""
