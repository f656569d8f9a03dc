"""The registry of qualities, and the contract of its members."""

from fvcore.common.registry import Registry

QUALITY_REGISTRY = Registry("QUALITY")
QUALITY_REGISTRY.__doc__ = """
A quality rates an image's result at an exit with a number in [0, 1]; higher is better. MODEL.ECO.QUALITY names a
member. Step B computes it, Step C fits gates to it, and the report shows it. A member is a class. Its module must not
import detectron2 or pycocotools at the top, because Step C reads the class without them. The class has

- `name`: unique text for derived datasets, messages and file names;
- `annotation`: "panoptic" or "boxes": what a model must predict. Compared with `Parent.annotation`;
- `files`: keys of an image's record, whose files hold the ground truth;
- `category_keys`: keys of a category that `exact` needs beside `id`;
- `columns`: {column of CSV files: title in tables} of the numbers of a choice of exits. They are those of `exact`, or
  {"quality": title} for the mean over the images. The first column ranks gates;
- `exact`: None, or a static function (summed `ImageStatistics`, categories) -> {column: number in [0, 1]}, the quality
  of the whole dataset. The number is NaN if nothing counts;
- `exact_each`, optional: `exact` of R totals at once, (ids of C categories, their sums [R, 4, C] of iou, tp, fp and fn,
  categories) -> {column: [R]}. It makes resampling faster;
- `mirrored`, optional: a static function (prediction for quality, width of the image) -> the same prediction, mirrored
  from left to right. The mirrored view of Step B needs it;
- `result_file`: the JSON file that an evaluation of the whole model writes;
- `evaluated_columns`, `evaluated(content)`: {column: title}, and a static function from the content of this file to
  {column: points of 100};
- `switch`: the config key that must be on for this evaluation, or "" if it always runs;
- `of(dataset_name) -> member`: a class method. For a dataset without the annotation it raises ValueError, with the
  remedy.

An instance has

- `categories`: those of the dataset, `id` and other known keys, in the ids of the statistics;
- `prepare(model, pred, images, x) -> prediction for quality`: from the head's output at one exit, for a batch of one
  image x. The prediction is small, on the host, and can be pickled;
- `comparison(x) -> function`: from the predictions of image x, one per exit, to a pair for each: the quality, and its
  `ImageStatistics` or None. The function reads the ground truth when it is called. It can be pickled, because a worker
  process calls it.

If nothing can be found in an image, its quality is 0 at every exit, and its exit target is the cheapest exit.
"""


def quality_named(name: str) -> type:
    """The member with this `name`. Raises ValueError if there is none."""
    members = {member.name: member for _, member in QUALITY_REGISTRY}
    if name not in members:
        raise ValueError(
            f"the quality {name!r} is not one of {', '.join(sorted(members))}: import the module that registers it, or "
            "derive the dataset with another MODEL.ECO.QUALITY"
        )
    return members[name]


def quality_of_model(key: str, model) -> type:
    """The member that MODEL.ECO.QUALITY names. Raises ValueError if there is none, or it does not suit the model."""
    members = dict(QUALITY_REGISTRY)
    suited = sorted(k for k, member in members.items() if member.annotation == model.annotation)
    if key not in suited:
        why = f"needs a model of {members[key].annotation}" if key in members else "is not known"
        raise ValueError(
            f"MODEL.ECO.QUALITY {key} {why}: for {type(model).__name__} set it to one of {', '.join(suited)}"
        )
    return members[key]
