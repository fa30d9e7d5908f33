"""What the measured figures add up to. Nothing here computes a gradient."""
