"""The stages in order; run.py is the file to read first."""
