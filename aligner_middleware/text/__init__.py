"""Text to token ids and back: prompts, tokenizers, sentences, and what is wrong with a text. Knows no model."""
