"""What the machine has: cores, memory, devices, and how fast arithmetic runs on them."""
