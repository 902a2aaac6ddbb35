"""What is done to weights: one file each, checkpoint in, stock folder out, streamed."""
