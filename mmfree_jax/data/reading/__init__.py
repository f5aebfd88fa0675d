"""What training reads: token sets on disk, the documents in a window, shuffled batches, counts of targets."""
