"""Rows, prompts and files: what jobs read and write, and whom they ask."""
