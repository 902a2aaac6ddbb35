"""The decision: which source layers make each output layer. Pure: no torch."""
