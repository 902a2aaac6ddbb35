"""Where a run works: its folders, its turn at the processor, its servers."""
