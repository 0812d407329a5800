"""What a workflow cannot do without, said in one sentence."""

from __future__ import annotations

import importlib.util

import torch


def require_tensorrt() -> None:
    """Make sure that TensorRT can run: without it MONAI's trt_compile would go on with PyTorch.

    Raises:
        RuntimeError: There is no GPU, or a package is missing.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("inference_trt.json: TensorRT needs an NVIDIA GPU, none was found. Leave it out.")
    missing = [name for name in ("tensorrt", "polygraphy", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"inference_trt.json: {', '.join(missing)}: not installed. Run `pip install {' '.join(missing)}`."
        )
