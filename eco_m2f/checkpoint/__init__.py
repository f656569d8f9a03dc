"""Weights: read safely, named, compared with the model, saved whole."""
