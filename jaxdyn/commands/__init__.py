"""What the command line does: a file a command, and its options in one that imports no JAX."""
