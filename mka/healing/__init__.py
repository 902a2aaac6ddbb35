"""What was merged trained back towards its base by gradient: the whole model by its logits, or layer by layer."""
