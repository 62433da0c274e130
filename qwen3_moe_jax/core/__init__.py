"""The words that every backend shares: runners, stages, sampling, errors."""
