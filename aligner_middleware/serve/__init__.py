"""The aligner as a service: before any model, for any language."""
