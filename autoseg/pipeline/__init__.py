"""A run from start to end: run.py is the file to read first, stages.py has the table of stages."""
