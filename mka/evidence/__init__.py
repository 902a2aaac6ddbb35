"""What a method may ask to see: hidden states, oracles of planned models, cuts of the residual stream."""
