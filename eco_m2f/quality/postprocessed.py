"""The results of one image, for the qualities of masks."""

from collections.abc import Mapping
from dataclasses import replace


def results_of(model, pred: Mapping, images, x: Mapping, **changes) -> dict:
    """Post-processes the head's output for a batch of one image x.

    changes: fields of the model's `PostProcessor` to change, which also documents the results.
    """
    size, padded = images.image_sizes[0], tuple(images.tensor.shape[-2:])
    postprocess = replace(model.postprocessor, **changes)
    return postprocess(pred["pred_logits"][0], pred["pred_masks"][0], padded, size, model.output_size(x, size))
