"""The model over HTTP: an engine process that owns it, a scheduler, and the protocols that clients speak."""
