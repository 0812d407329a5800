"""Where numbers of a run go besides its own files: TensorBoard, MLflow or Weights & Biases, by the setting `track`."""
