"""The commands that prove and explain: verify, trace, bisect, experts."""
