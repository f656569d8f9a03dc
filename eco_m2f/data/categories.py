"""The categories of a dataset, and whether two datasets have the same ones.

A category is a mapping with `id` (the dataset's own) and `name`. It also has `isthing` if the dataset separates things
from stuff. Two datasets match if they list the same categories, in any order. A model's class i is the i-th category of
its training set. In another dataset it is the category with the same id and name.
"""

from collections.abc import Mapping, Sequence

SEMANTIC_TYPES = ("sem_seg", "cityscapes_sem_seg")  # evaluator_type of datasets that have only class maps


def check_same_categories(
    reference: Sequence[Mapping], other: Sequence[Mapping], of_reference: str, of_other: str
) -> None:
    """Raises ValueError, with both lists, unless they hold the same categories in any order.

    It compares id and name, and isthing if both have it. of_reference, of_other: names for the message, such as "the
    training set 'cells_train'".
    """
    if same_categories(reference, other):
        return
    only = [_text(c) for c in reference if not any(_equal(c, o) for o in other)]
    more = [_text(o) for o in other if not any(_equal(c, o) for c in reference)]
    all_of_reference, all_of_other = ([_text(c) for c in categories] for categories in (reference, other))
    raise ValueError(
        f"the categories of {of_other} are not those of {of_reference}: it lacks {_shortened(only)} and adds "
        f"{_shortened(more)}. Make both annotations from one list of categories. The id, name and isthing of each "
        f"must be the same; their order is free. {of_reference} has {_shortened(all_of_reference, 200)}; "
        f"{of_other} has {_shortened(all_of_other, 200)}"
    )


def same_categories(reference: Sequence[Mapping], other: Sequence[Mapping]) -> bool:
    """Whether both list the same categories, in any order."""
    by_id = {c["id"]: c for c in other}
    return len(reference) == len(other) and all(c["id"] in by_id and _equal(c, by_id[c["id"]]) for c in reference)


def check_same_classes(
    reference: Sequence[Mapping], other: Sequence[Mapping], of_reference: str, of_other: str
) -> None:
    """Like `check_same_categories`, but the order must be the same too."""
    check_same_categories(reference, other, of_reference, of_other)
    if [c["id"] for c in reference] != [c["id"] for c in other]:
        raise ValueError(
            f"{of_reference} has the classes {[c['name'] for c in reference]} in this order, {of_other} has "
            f"{[c['name'] for c in other]}, the same categories in different orders: register both by one list "
            "DATASETS.CUSTOM, or write the categories into the annotation in the training set's order"
        )


def by_position(categories: Sequence[Mapping]) -> list[dict]:
    """The categories as in class maps: the id is the position in the list, and there is no isthing."""
    return [{"id": i, "name": c["name"]} for i, c in enumerate(categories)]


def in_order_of(reference: Sequence[Mapping], categories: Sequence[Mapping]) -> list[Mapping]:
    """The categories in the order of `reference` if it lists the same ones, else in their own order."""
    if not same_categories(reference, categories):
        return list(categories)
    by_id = {c["id"]: c for c in categories}
    return [by_id[c["id"]] for c in reference]


def registered_categories(metadata) -> list[dict]:
    """A registered dataset's categories by contiguous class, from detectron2's metadata.

    They have id, name and, for panoptic datasets, isthing. If a dataset has only class maps, the classes are the ids.
    [] if the metadata name no classes.
    """
    things = getattr(metadata, "thing_dataset_id_to_contiguous_id", None)
    stuff = getattr(metadata, "stuff_dataset_id_to_contiguous_id", None)
    names = getattr(metadata, "stuff_classes", None) or getattr(metadata, "thing_classes", None) or []
    if not (things or stuff) or getattr(metadata, "evaluator_type", None) in SEMANTIC_TYPES:
        return by_position([{"name": name} for name in names])
    classes = sorted({**(stuff or {}), **(things or {})}.items(), key=lambda entry: entry[1])
    if stuff is None:  # boxes
        return [{"id": c, "name": metadata.thing_classes[i]} for c, i in classes]
    return [{"id": c, "name": names[i], "isthing": int(c in (things or {}))} for c, i in classes]


def _equal(a: Mapping, b: Mapping) -> bool:
    known = "isthing" in a and "isthing" in b
    return (a["id"], a["name"]) == (b["id"], b["name"]) and (not known or bool(a["isthing"]) == bool(b["isthing"]))


def _text(category: Mapping) -> str:
    kind = {True: " (thing)", False: " (stuff)"}[bool(category["isthing"])] if "isthing" in category else ""
    return f"{category['id']} {category['name']}{kind}"


def _shortened(texts: Sequence[str], most: int = 10) -> str:
    """The texts as a list of at most `most`; "none" if there are none."""
    more = f", ... ({len(texts)} in all)" if len(texts) > most else ""
    return f"[{', '.join(texts[:most])}{more}]" if texts else "none"
