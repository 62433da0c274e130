"""Models on a model hub: names, listings, downloads that resume, and what is on this machine already."""
