"""Reads weights safely, renames them, compares them with the model, and saves them whole."""
