"""What ``qwen3-moe chat`` is made of: the editor, the screen, the conversation and its commands."""
