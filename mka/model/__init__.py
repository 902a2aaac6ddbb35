"""A model on disk, and the few layers of it in memory; the one room that knows how models are laid out."""
