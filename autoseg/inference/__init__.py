"""From images and trained networks to labels: windows, restoring the grid, predictors, metrics."""
