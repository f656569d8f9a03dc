"""Mask2Former and MaskFormer, and Mask2Former with early exits."""
