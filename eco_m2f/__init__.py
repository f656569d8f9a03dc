"""ECO-M2F: a Mask2Former in which each image may leave the transformer encoder early."""

__version__ = "0.1.0"
