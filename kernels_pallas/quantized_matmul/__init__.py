"""Matrix product of activations with one packed matrix."""
