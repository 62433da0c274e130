"""How fast the model is, and how well it predicts a text."""
