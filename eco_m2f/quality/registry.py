"""The registry of qualities, and the contract of its members."""

from fvcore.common.registry import Registry

QUALITY_REGISTRY = Registry("QUALITY")
QUALITY_REGISTRY.__doc__ = """
A quality rates an image's result at an exit by a number in [0, 1]; higher is better. MODEL.ECO.QUALITY names a member.
Step B computes it, Step C fits gates to it, and the report shows it. A member is a class. Its module imports neither
detectron2 nor pycocotools at the top, since Step C reads the class without them. The class says

- `name`: text, as derived datasets, messages and names of files have it; each member has its own;
- `annotation`: "panoptic" or "boxes", what a model must predict; compared with `Parent.annotation`;
- `files`: keys of an image's record whose files the ground truth is read from;
- `category_keys`: what a category must have beside `id` for `exact`;
- `columns`: {column of CSV files: title in tables} of the numbers of a choice of exits: those of `exact`, or
  {"quality": title} for the mean over the images. The first decides between gates;
- `exact`: None, or a static function (summed `ImageStatistics`, categories) -> {column: number in [0, 1], or NaN where
  nothing counts}, the quality of the whole dataset;
- `exact_each`, optional: `exact` of R totals at once, (ids of C categories, their sums [R, 4, C] of iou, tp, fp and fn,
  categories) -> {column: [R]}. Resampling takes less time with it;
- `result_file`, `evaluated_columns`, `evaluated(content)`: the JSON that an evaluation of the whole model leaves,
  {column: title}, and the static function from the file's content to {column: points of 100};
- `switch`: the config key that must be on for that evaluation, or "" where it always runs.

- `of(dataset_name) -> member` is a class method. It raises ValueError, with the remedy, for a dataset without the
  annotation that is needed.

And an instance has

- `categories`: of the dataset, `id` and what else is known, in the ids of the statistics;
- `prepare(model, pred, images, x) -> prediction`: from the head's output at one exit, for a batch of one image x, what
  will be compared. It is small, on the host, and can be pickled;
- `comparison(x) -> function`: from the predictions of image x, one per exit, to a pair for each: the quality, and its
  `ImageStatistics` or None. It reads the ground truth when it is called. It can be pickled: a worker process calls it.

An image in which nothing can be found has quality 0 at every exit: no exit is better than another there, and the
cheapest is its exit target.
"""


def quality_named(name: str) -> type:
    """The member of that `name`. Raises ValueError where there is none."""
    members = {member.name: member for _, member in QUALITY_REGISTRY}
    if name not in members:
        raise ValueError(
            f"the quality {name!r} is not known, there are {', '.join(sorted(members))}: import the module that "
            "registers it, or derive the dataset with another MODEL.ECO.QUALITY"
        )
    return members[name]


def quality_of_model(key: str, model) -> type:
    """The member that MODEL.ECO.QUALITY names. Raises ValueError where there is none, or it does not suit the model."""
    members = dict(QUALITY_REGISTRY)
    suited = sorted(k for k, member in members.items() if member.annotation == model.annotation)
    if key not in suited:
        why = f"needs a model of {members[key].annotation}" if key in members else "is not known"
        raise ValueError(
            f"MODEL.ECO.QUALITY {key} {why}: for {type(model).__name__} set it to one of {', '.join(suited)}"
        )
    return members[key]
