"""Evidence for people: page, card, pictures, and the index over all runs."""
