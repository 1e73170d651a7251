"""From a name to weights: base models, adapters, differences. Needs the `[build]` extra."""
