"""AutoML for 3D medical image segmentation: from a folder of volumes to an ensemble and its scores."""

__version__ = "0.1.0"
