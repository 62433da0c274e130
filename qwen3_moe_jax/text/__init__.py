"""Text to token ids and back: tokenizer, chat templates, streams of text."""
