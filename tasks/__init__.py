"""The stages of a recompression: each is a guard, one call into `mka`, a guard, and one record."""
