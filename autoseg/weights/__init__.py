"""Weights to start from: read from a file without running anything, fitted to a plan's network, and accounted for."""
