"""The engine: a child process that owns the model, and the scheduler that fills its slots."""
