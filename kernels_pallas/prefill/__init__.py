"""Matrix products of many tokens with packed weights on Hopper GPUs, for the ops' ``pallas_sm90`` files."""
