"""Evaluators: PQ, mIoU and AP of datasets, exits taken, tokens kept."""
