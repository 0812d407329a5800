"""`autoseg sweep`: an Optuna study whose trials are training jobs; run.py is the file to read first."""
