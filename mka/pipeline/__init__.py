"""Every stage in order, told once: the job, the stages, what they will cost, and the run."""
