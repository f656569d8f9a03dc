"""The categories of datasets: which they are, and whether those of one dataset are those of another.

A category is a mapping with `id` (the dataset's own), `name` and, where things and stuff are told apart, `isthing`. Two
datasets go together where they list the same categories, in whatever order: a model's class i is the i-th category of
the dataset that it was trained on, and of the others the one with that id and name.
"""

from collections.abc import Mapping, Sequence

SEMANTIC_TYPES = ("sem_seg", "cityscapes_sem_seg")  # evaluator_type of datasets that have class maps alone


def check_same_categories(
    reference: Sequence[Mapping], other: Sequence[Mapping], of_reference: str, of_other: str
) -> None:
    """Raises ValueError unless both list the same categories; their order is free.

    Compared are id and name, and isthing where both have it. of_reference, of_other: whose categories they are, as
    "the training set 'cells_train'", for the message, which shows both lists.
    """
    if same_categories(reference, other):
        return
    only = [_told(c) for c in reference if not any(_equal(c, o) for o in other)]
    more = [_told(o) for o in other if not any(_equal(c, o) for c in reference)]
    all_of_reference, all_of_other = ([_told(c) for c in categories] for categories in (reference, other))
    raise ValueError(
        f"the categories of {of_other} are not those of {of_reference}: only the latter has {_some(only)}, only the "
        f"former {_some(more)}. Make both annotations from one list of categories: id, name and isthing of each "
        f"must be the same, their order is free. In all, {of_reference} has {_some(all_of_reference, 200)}, "
        f"and {of_other} has {_some(all_of_other, 200)}"
    )


def same_categories(reference: Sequence[Mapping], other: Sequence[Mapping]) -> bool:
    """Whether both list the same categories, in whatever order."""
    by_id = {c["id"]: c for c in other}
    return len(reference) == len(other) and all(c["id"] in by_id and _equal(c, by_id[c["id"]]) for c in reference)


def check_same_classes(
    reference: Sequence[Mapping], other: Sequence[Mapping], of_reference: str, of_other: str
) -> None:
    """As `check_same_categories`, and raises ValueError, with both lists, unless they are in the same order too."""
    check_same_categories(reference, other, of_reference, of_other)
    if [c["id"] for c in reference] != [c["id"] for c in other]:
        raise ValueError(
            f"{of_reference} has the classes {[c['name'] for c in reference]} in this order, {of_other} has "
            f"{[c['name'] for c in other]}, the same categories in different orders: register both by one list "
            "DATASETS.CUSTOM, or list the categories of the annotation in the order of the training"
        )


def by_position(categories: Sequence[Mapping]) -> list[dict]:
    """The categories as class maps know them: their place in the list is their id, and there are no kinds."""
    return [{"id": i, "name": c["name"]} for i, c in enumerate(categories)]


def in_order_of(reference: Sequence[Mapping], categories: Sequence[Mapping]) -> list[Mapping]:
    """The categories in the order of a reference that lists the same ones; as they are where it lists others."""
    if not same_categories(reference, categories):
        return list(categories)
    by_id = {c["id"]: c for c in categories}
    return [by_id[c["id"]] for c in reference]


def registered_categories(metadata) -> list[dict]:
    """A registered dataset's categories by contiguous class, from detectron2's metadata: id, name, perhaps isthing.

    A dataset of class maps alone has no ids of its own: there they are the classes. [] where the metadata say nothing.
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


def _told(category: Mapping) -> str:
    kind = {True: " (thing)", False: " (stuff)"}[bool(category["isthing"])] if "isthing" in category else ""
    return f"{category['id']} {category['name']}{kind}"


def _some(told: Sequence[str], most: int = 10) -> str:
    """At most so many of them."""
    more = f", ... ({len(told)} in all)" if len(told) > most else ""
    return f"[{', '.join(told[:most])}{more}]" if told else "none"
