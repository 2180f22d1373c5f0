"""Where sites live: a live model, a checkpoint on disk, and views over either."""
