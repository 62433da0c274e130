"""Benchmarks, checks, profiles and makers of files; run as `python -m scripts.NAME`."""
