"""Programs that engines' own environments run: the standard library, the engine, and nothing of this project."""
