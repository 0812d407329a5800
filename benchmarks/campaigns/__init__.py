"""The campaigns of benchmarks/reliability.py, one a module."""
