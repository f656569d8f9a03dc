"""Datasets, mappers and the toy set. Importing `data.datasets` registers the project's datasets with detectron2."""
