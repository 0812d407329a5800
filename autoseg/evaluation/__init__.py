"""Scores of predictions: metrics, calibration, the rules of challenges, tables, folders."""
