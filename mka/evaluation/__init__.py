"""What was lost, and whether it is too much: metrics, perplexity, tasks, speed, bootstrap, gate."""
