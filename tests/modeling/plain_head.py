"""Mask2Former's head in NumPy and float64, one image at a time. It is slow and shares no code with the real head.

Sources: Mask2Former (arXiv 2112.01527); Deformable DETR (arXiv 2010.04159), sections 3.2 and 4. It takes the state dict
of the real head, so parameter names are the same.
"""

from collections.abc import Mapping

import numpy as np

EPSILON = 1e-5  # of the norms
GROUPS = 32
HEADS = 8
POINTS = 4
LEVELS = ("res5", "res4", "res3")  # coarse to fine


class PlainHead:
    """weights: the state dict of a `MaskFormer`, as tensors or arrays. The backbone's weights are not read."""

    def __init__(self, weights: Mapping):
        part = "sem_seg_head."
        self.w = {k.removeprefix(part): np.asarray(v, np.float64) for k, v in weights.items() if k.startswith(part)}

    def __call__(self, features: Mapping, exit_: int) -> dict:
        """features: maps [C, h, w] of one image by name, "res2" to "res5".

        Returns "mask_features" [C, h, w], "maps" coarse to fine, and "predictions": (logits [Q, classes + 1], masks
        [Q, h, w]) before the first layer and after each layer of the predictor.
        """
        features = {name: np.asarray(f, np.float64) for name, f in features.items()}
        maps = self.encode([self.project(i, features[name]) for i, name in enumerate(LEVELS)], exit_)
        mask_features = self.mask_branch(features["res2"], maps[-1])
        return {"maps": maps, "mask_features": mask_features, "predictions": self.predict(maps, mask_features)}

    def project(self, level: int, x: np.ndarray) -> np.ndarray:
        name = f"pixel_decoder.input_proj.{level}"
        return self.group_norm(f"{name}.1", self.conv(f"{name}.0", x))

    def encode(self, maps: list[np.ndarray], num_layers: int) -> list[np.ndarray]:
        shapes = [m.shape[1:] for m in maps]
        levels = self.w["pixel_decoder.transformer.level_embed"]
        positions = [sine(*m.shape[1:], len(m)) + embed[:, None, None] for m, embed in zip(maps, levels)]
        tokens, positions = (np.concatenate([m.reshape(len(m), -1).T for m in ms]) for ms in (maps, positions))
        centres = [((x + 0.5) / w, (y + 0.5) / h) for h, w in shapes for y in range(h) for x in range(w)]
        for i in range(num_layers):
            name = f"pixel_decoder.transformer.encoder.layers.{i}"
            seen = self.look_around(f"{name}.self_attn", tokens + positions, np.array(centres), tokens, shapes)
            tokens = self.layer_norm(f"{name}.norm1", tokens + seen)
            hidden = np.maximum(self.linear(f"{name}.linear1", tokens), 0)
            tokens = self.layer_norm(f"{name}.norm2", tokens + self.linear(f"{name}.linear2", hidden))
        return [t.T.reshape(-1, h, w) for t, (h, w) in zip(split(tokens, shapes), shapes)]

    def look_around(self, name: str, query: np.ndarray, centres: np.ndarray, value: np.ndarray, shapes) -> np.ndarray:
        """Deformable attention: each head of each query reads POINTS places of each map."""
        value = self.linear(f"{name}.value_proj", value)
        width = value.shape[1] // HEADS
        offsets = self.linear(f"{name}.sampling_offsets", query).reshape(len(query), HEADS, len(shapes), POINTS, 2)
        scores = self.linear(f"{name}.attention_weights", query).reshape(len(query), HEADS, len(shapes) * POINTS)
        weights = softmax(scores).reshape(len(query), HEADS, len(shapes), POINTS)
        read = np.zeros_like(value)
        for level, (tokens, (h, w)) in enumerate(zip(split(value, shapes), shapes)):
            grid = tokens.reshape(h, w, -1)
            for head in range(HEADS):
                channels = slice(head * width, (head + 1) * width)
                for point in range(POINTS):
                    dx, dy = offsets[:, head, level, point].T
                    at = sample(grid[..., channels], centres[:, 0] * w + dx - 0.5, centres[:, 1] * h + dy - 0.5)
                    read[:, channels] += weights[:, head, level, point, None] * at
        return self.linear(f"{name}.output_proj", read)

    def mask_branch(self, res2: np.ndarray, finest: np.ndarray) -> np.ndarray:
        lateral = self.group_norm("pixel_decoder.adapter_1.norm", self.conv("pixel_decoder.adapter_1", res2))
        x = self.conv("pixel_decoder.layer_1", lateral + resize(finest, res2.shape[1:]))
        x = np.maximum(self.group_norm("pixel_decoder.layer_1.norm", x), 0)
        return self.conv("pixel_decoder.mask_features", x)

    def predict(self, maps: list[np.ndarray], mask_features: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        query, place = self.w["predictor.query_feat.weight"], self.w["predictor.query_embed.weight"]
        predictions = [self.read_out(query, mask_features)]
        for i in range(sum(name.startswith("predictor.transformer_ffn_layers") for name in self.w) // 6):
            level = i % len(maps)
            shape = maps[level].shape[1:]
            allowed = resize(predictions[-1][1], shape).reshape(len(query), -1) >= 0
            allowed[~allowed.any(axis=1)] = True
            values = maps[level].reshape(len(maps[level]), -1).T + self.w["predictor.level_embed.weight"][level]
            keys = values + sine(*shape, values.shape[1]).reshape(values.shape[1], -1).T

            name = f"predictor.transformer_cross_attention_layers.{i}"
            seen = self.attend(f"{name}.multihead_attn", query + place, keys, values, allowed)
            query = self.layer_norm(f"{name}.norm", query + seen)
            name = f"predictor.transformer_self_attention_layers.{i}"
            seen = self.attend(f"{name}.self_attn", query + place, query + place, query, np.ones((1, 1), bool))
            query = self.layer_norm(f"{name}.norm", query + seen)
            name = f"predictor.transformer_ffn_layers.{i}"
            hidden = np.maximum(self.linear(f"{name}.linear1", query), 0)
            query = self.layer_norm(f"{name}.norm", query + self.linear(f"{name}.linear2", hidden))
            predictions.append(self.read_out(query, mask_features))
        return predictions

    def read_out(self, query: np.ndarray, mask_features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        query = self.layer_norm("predictor.decoder_norm", query)
        logits = self.linear("predictor.class_embed", query)
        for i in range(3):
            query = self.linear(f"predictor.mask_embed.layers.{i}", query)
            query = np.maximum(query, 0) if i < 2 else query
        return logits, np.tensordot(query, mask_features, 1)

    def attend(self, name: str, query, keys, values, allowed) -> np.ndarray:
        w, b = self.w[f"{name}.in_proj_weight"], self.w[f"{name}.in_proj_bias"]
        dim = query.shape[1]
        query, keys, values = (
            x @ w[i * dim : (i + 1) * dim].T + b[i * dim : (i + 1) * dim] for i, x in enumerate((query, keys, values))
        )
        read = np.zeros_like(query)
        for part in np.split(np.arange(dim), HEADS):
            scores = query[:, part] @ keys[:, part].T / np.sqrt(len(part))
            read[:, part] = softmax(np.where(allowed, scores, -np.inf)) @ values[:, part]
        return self.linear(f"{name}.out_proj", read)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def conv(self, name: str, x: np.ndarray) -> np.ndarray:
        """A 1 x 1 or 3 x 3 convolution that keeps the size."""
        kernel = self.w[f"{name}.weight"]
        pad = kernel.shape[-1] // 2
        padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
        out = np.zeros((len(kernel), *x.shape[1:]))
        for dy in range(kernel.shape[2]):
            for dx in range(kernel.shape[3]):
                shifted = padded[:, dy : dy + x.shape[1], dx : dx + x.shape[2]]
                out += np.tensordot(kernel[:, :, dy, dx], shifted, 1)
        return out + self.w.get(f"{name}.bias", np.zeros(len(kernel)))[:, None, None]

    def group_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        groups = normalise(x.reshape(GROUPS, -1)).reshape(x.shape)
        return groups * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def layer_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return normalise(x) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]


def normalise(x: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 along the last axis."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def split(tokens: np.ndarray, shapes) -> list[np.ndarray]:
    """Tokens by level."""
    return np.split(tokens, np.cumsum([h * w for h, w in shapes])[:-1])


def sample(grid: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear values of a map [h, w, C] at pixels (x, y) -> [n, C]. Pixel centres are whole numbers; 0 outside."""
    h, w, channels = grid.shape
    out = np.zeros((len(x), channels))
    for corner_y in (np.floor(y), np.floor(y) + 1):
        for corner_x in (np.floor(x), np.floor(x) + 1):
            weight = (1 - np.abs(x - corner_x)) * (1 - np.abs(y - corner_y))
            inside = (0 <= corner_x) & (corner_x < w) & (0 <= corner_y) & (corner_y < h)
            pixels = grid[corner_y[inside].astype(int), corner_x[inside].astype(int)]
            out[inside] += weight[inside, None] * pixels
    return out


def resize(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, by pixel areas (not corners), without antialiasing: [C, h, w] -> [C, *size]."""
    rows, columns = (interpolation(old, new) for old, new in zip(x.shape[1:], size))
    return np.einsum("ih,chw,jw->cij", rows, x, columns)


def interpolation(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] that resizes one axis."""
    matrix = np.zeros((new, old))
    for i in range(new):
        at = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        low = int(at)
        matrix[i, low] += 1 - (at - low)
        matrix[i, min(low + 1, old - 1)] += at - low
    return matrix


def sine(height: int, width: int, dim: int) -> np.ndarray:
    """DETR's position code, [dim, height, width]: y in the first half of the channels, x in the second."""
    code = np.zeros((dim, height, width))
    half = dim // 2
    for channel in range(half):
        turn = np.cos if channel % 2 else np.sin
        period = 10000 ** ((channel - channel % 2) / half)
        code[channel] = turn(2 * np.pi * np.arange(1, height + 1) / (height + 1e-6) / period)[:, None]
        code[half + channel] = turn(2 * np.pi * np.arange(1, width + 1) / (width + 1e-6) / period)
    return code
