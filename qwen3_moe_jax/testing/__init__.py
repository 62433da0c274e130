"""Random models, planted faults and builders of files, for tests and scripts."""
