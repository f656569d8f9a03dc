"""Exits chosen during the run: the encoder stops at each exit, and the policy decides which images leave there."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .encoders.exit_encoder import take_rows
from .parent import ExitHead

Cells = Sequence[tuple[int, int]]  # (rows, columns) that an image covers on each map of the encoder, coarse to fine


def predict_exit_by_exit(
    head: ExitHead, policy: nn.Module, features: dict[str, Tensor], cells: Sequence[Cells]
) -> tuple[list[int], dict[str, Tensor]]:
    """The exit of each image, and the prediction of the batch [B, ...].

    Layers run only on images that have not left. The decoder runs once per image.

    Args:
        policy: a sequential policy, see `EXIT_POLICY_REGISTRY`.
        features: the backbone's maps, [B, C, h, w] each.
        cells: one entry per image.
    """
    shared, before, run = head.start(features)
    images, exits, parts = torch.arange(len(cells)), {}, []
    for k in policy.exits:
        run, maps = head.advance(run, k)
        leaves = torch.ones(len(images), dtype=torch.bool)  # [images that have not left]
        if k != policy.exits[-1]:
            leaves = images_that_leave(policy, k, maps, before, [cells[i] for i in images.tolist()])
        if leaves.any():
            rows = leaves.nonzero()[:, 0].to(maps[0].device)
            parts.append((images[leaves], head.decode(take_rows(shared, rows), take_rows(maps, rows), aux=False)))
            exits |= dict.fromkeys(images[leaves].tolist(), k)
        if leaves.all():
            break
        images, rows = images[~leaves], (~leaves).nonzero()[:, 0].to(maps[0].device)
        shared, before, run = take_rows((shared, maps, run), rows)
    return [exits[i] for i in range(len(cells))], merge_rows(parts)


def images_that_leave(
    policy: nn.Module, exit: int, maps: Sequence[Tensor], before: Sequence[Tensor], cells: Sequence[Cells]
) -> Tensor:
    """The policy's decisions, bool [B] on the host. It sees each image's own tokens, without padding."""
    answers = []
    for i, sizes in enumerate(cells):
        own = ([m[i, :, :h, :w] for m, (h, w) in zip(state, sizes)] for state in (maps, before))  # [C, h, w] each
        answers.append(policy.leaves(exit, *own))
    return torch.stack(answers).cpu()


def merge_rows(parts: Sequence[tuple[Tensor, dict]]) -> dict[str, Tensor]:
    """The prediction of a batch from its parts: (places [n] of the images in the batch, their prediction)."""
    if len(parts) == 1:
        return parts[0][1]
    size = sum(len(rows) for rows, _ in parts)
    merged = {}
    for rows, pred in parts:
        for name, value in pred.items():
            if not isinstance(value, Tensor):
                continue  # auxiliary outputs are for training
            if name not in merged:
                merged[name] = value.new_empty(size, *value.shape[1:])
            merged[name][rows.to(value.device)] = value
    return merged
