"""Lists of cases: their files, folds, and the layouts of other tools."""
