"""Many pipelines side by side: the comparison of methods, its statistics, its tables and its page."""
