"""ECO-M2F: Mask2Former whose transformer encoder each image may leave early."""

__version__ = "0.1.0"
