"""One file for each model library: load, check, make sparse, leave the caller's model as it was."""
