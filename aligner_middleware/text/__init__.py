"""Text to token ids and back: prompts, tokenizers, sentences and safeguards. Knows no model."""
