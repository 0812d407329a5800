"""What MONAI's components lack to predict as autoseg does. Bundles carry copies; PyTorch, MONAI and NumPy suffice."""
