"""Matrix product of each token with the packed matrices of its chosen experts."""
