"""The `aligner` command."""
