"""Engines in processes of other hosts behind fronts of their own, whatever carries what they say."""
