"""What the bytes of a GGUF file are: read, check, unpack, pack. Needs NumPy alone."""
