"""A file of requests, answered by the server's own endpoints without a socket: ``qwen3-moe batch``."""
