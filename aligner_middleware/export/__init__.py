"""From a checkpoint to the folder that is served. Needs the `[build]` extra."""
