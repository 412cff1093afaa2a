"""Ten classes of drawn textures, 28 x 28 bytes: gratings of two orientations about a place, with noise."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

import rlmeta as rl
from rlmeta.data.samples import Samples
from rlmeta.data.sets import Labelled
from rlmeta.data.splits import split
from rlmeta.envs.streams import TaskStream

GROUPS = [[0, 1, 2], [3], [4, 5, 6, 7], [8, 9]]
NOISE = 0.35


def _draw(style: list[tuple[float, float]], count: int, random: np.random.Generator) -> Any:
    y, x = np.mgrid[0:28, 0:28] / 28
    images = []
    for _ in range(count):
        image = np.zeros((28, 28))
        for angle, frequency in style[:2]:
            turned = angle + random.normal() * 0.08
            wave = x * np.cos(turned) + y * np.sin(turned)
            image = image + np.sin(2 * np.pi * frequency * wave + random.uniform(-0.6, 0.6))
        across, down = style[2][0] + random.normal() * 0.05, style[2][1] + random.normal() * 0.05
        spot = np.exp(-((x - across) ** 2 + (y - down) ** 2) / 0.18)
        images.append(image * spot + random.normal(size=image.shape) * NOISE * 2)
    pictures = np.stack(images)
    low = pictures.min((1, 2), keepdims=True)
    return ((pictures - low) / (np.ptp(pictures, axis=(1, 2), keepdims=True) + 1e-9) * 255).astype(np.uint8)


@functools.cache
def textures(scenario: Any = "class") -> TaskStream:
    """Four tasks of 3, 1, 4 and 2 classes; 400 pictures a class to learn from, 150 to be tested."""
    random = np.random.default_rng(7)
    styles = [
        [(random.uniform(0, np.pi), random.uniform(1.5, 6)) for _ in range(2)]
        + [(random.uniform(0.2, 0.8), random.uniform(0.2, 0.8))]
        for _ in range(10)
    ]
    parts = []
    for count in (400, 150):
        parts.append([_draw(style, count, random) for style in styles])
    packed = []
    for drawn in parts:
        x = torch.from_numpy(np.concatenate(drawn)).reshape(-1, 784)
        target = torch.arange(10).repeat_interleave(len(drawn[0]))
        order = torch.from_numpy(random.permutation(len(target)))
        packed.append(Samples(x[order], target[order]))
    return rl.stream(split(Labelled(*packed, 10), GROUPS, scenario), name="textures", scenario=scenario)
