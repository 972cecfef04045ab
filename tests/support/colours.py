"""Colours as people with colour blindness see them, and how far apart they are: small and by the book.

Simulation: Machado, Oliveira and Fernandes 2009 (doi:10.1109/TVCG.2009.113), severity 1, matrices on linear RGB. Distance: CIE 1976,
Euclidean in Lab under D65; about 2.3 is a difference that is just seen side by side.
"""

from __future__ import annotations

import re

import numpy as np

BLINDNESS = {
    "none": np.eye(3),
    "protan": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deutan": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritan": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}
TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
WHITE = TO_XYZ.sum(axis=1)


def rgb(text: str) -> np.ndarray:
    """`#c94f00` -> [3] in 0..1."""
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def over(colour: np.ndarray, alpha: float, under: np.ndarray) -> np.ndarray:
    """A translucent colour on another, mixed as browsers do."""
    return alpha * colour + (1 - alpha) * under


def lab(colour: np.ndarray, blindness: str = "none") -> np.ndarray:
    """sRGB in 0..1 -> Lab, as seen."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    seen = np.clip(BLINDNESS[blindness] @ linear, 0, 1)
    relative = TO_XYZ @ seen / WHITE
    f = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(a: np.ndarray, b: np.ndarray, blindness: str) -> float:
    return float(np.linalg.norm(lab(a, blindness) - lab(b, blindness)))


def properties(css: str, theme: str) -> dict[str, str]:
    """The custom colours of the page in "light" or "dark"."""
    start = css.index(":root {" if theme == "light" else ':root[data-theme="dark"] {')
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css[start : css.index("}", start)]))
