"""Many runs: declared by an experiment, executed by workers, watched and collected from their folders alone."""
