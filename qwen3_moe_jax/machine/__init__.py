"""What this machine has: devices, memory, bandwidth, threads."""
