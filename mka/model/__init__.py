"""A model on disk, and the few layers of it in memory; the one package that knows how models are laid out."""
