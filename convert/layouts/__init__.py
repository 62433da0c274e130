"""Arrangements of packed arrays, one file each."""
