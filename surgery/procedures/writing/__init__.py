"""Writing: merged and unmerged checkpoints, their receipts and undo records, and the Hub."""
