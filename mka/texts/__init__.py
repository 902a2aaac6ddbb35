"""What is read: rows, overlap, calibration sets, windows, tokens."""
