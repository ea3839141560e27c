"""Changes to one float image [3, H, W] in R, G, B from 0 to 1, with the semantics of Pillow's ``ImageEnhance``.

Every function returns a new image in the same form and draws nothing at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor


def resized_crop(image: Tensor, scale: float, ratio: float, row: float, column: float) -> Tensor:
    """A crop of the image, resized to its size (bilinear, antialias).

    Args:
        image: float [3, H, W].
        scale: Share of the area.
        ratio: Width over height of the crop, which is cut to the image.
        row, column: Place of the crop, 0 at the upper and left end, 1 at the other.
    """
    height, width = image.shape[1:]
    area = scale * height * width
    high = min(height, max(1, round(math.sqrt(area / ratio))))
    wide = min(width, max(1, round(math.sqrt(area * ratio))))
    top, left = min(height - high, int(row * (height - high + 1))), min(width - wide, int(column * (width - wide + 1)))
    crop = image[:, top : top + high, left : left + wide]
    if (high, wide) == (height, width):
        return crop
    resized = F.interpolate(crop[None], size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    return resized[0].clamp_(0, 1)


def rotate(image: Tensor, degrees: float) -> Tensor:
    """The image turned counter-clockwise about its centre, as Pillow turns it; bilinear, filled by reflection."""
    height, width = image.shape[1:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # grid_sample looks up, for each output place, a source place in units of half the width and half the height.
    to_source = image.new_tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]])
    grid = F.affine_grid(to_source, [1, 3, height, width], align_corners=False)
    return F.grid_sample(image[None], grid, mode="bilinear", padding_mode="reflection", align_corners=False)[0]


def brightness(image: Tensor, factor: float) -> Tensor:
    """Every value times ``factor``."""
    return (image * factor).clamp_(0, 1)


def contrast(image: Tensor, factor: float) -> Tensor:
    """Away from (above 1) or towards (below 1) the mean grey of the image."""
    return _blend(_grey(image).mean(), image, factor)


def saturation(image: Tensor, factor: float) -> Tensor:
    """Away from or towards the image in greys."""
    return _blend(_grey(image), image, factor)


def sharpness(image: Tensor, factor: float) -> Tensor:
    """Away from or towards a 3 × 3 smoothing; the outermost pixels stay, as in Pillow."""
    if min(image.shape[1:]) < 3:
        return image
    # The kernel is 1 everywhere and 5 in the middle: a box sum, which separates, and four times the image.
    rows = image[:, :-2] + image[:, 1:-1] + image[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = image[:, 1:-1, 1:-1]
    smooth = image.clone()
    smooth[:, 1:-1, 1:-1] = torch.add(box, inner, alpha=4) / 13
    return _blend(smooth, image, factor)


def hue(image: Tensor, turn: float) -> Tensor:
    """Hues turned by a share of the colour circle; saturation and value in HSV stay."""
    value, highest = image.max(dim=0)
    chroma = value - image.amin(dim=0)
    red, green, blue = image.unbind(0)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sector = torch.stack(((green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4))
    angle = sector.gather(0, highest[None])[0] + 6 * turn
    # The usual closed form from hue to colour: value - chroma * clamp(min(k, 4 - k), 0, 1), k = (n + angle) mod 6.
    k = torch.remainder(angle + image.new_tensor([5.0, 3.0, 1.0])[:, None, None], 6)
    return (value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)).clamp_(0, 1)


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian of standard deviation ``sigma`` pixels, cut off at 3 of them; beyond the border a mirror image."""
    radius = min(math.ceil(3 * sigma), min(image.shape[1:]) - 1)
    if radius < 1:
        return image
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    weights = (kernel / kernel.sum()).to(image.dtype)
    # Colours as a batch of single-channel images: much faster on a CPU than a grouped convolution.
    padded = F.pad(image[:, None], (radius, radius, radius, radius), mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return blurred[:, 0].clamp_(0, 1)


COLOUR_CHANGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
    "sharpness": sharpness,
}
"""Setting → its operation, in the order they are applied."""


def _grey(image: Tensor) -> Tensor:
    red, green, blue = image.unbind(0)
    return red * 0.299 + green * 0.587 + blue * 0.114  # ITU-R 601, Pillow's mode L


def _blend(base: Tensor, image: Tensor, factor: float) -> Tensor:
    return (base + (image - base) * factor).clamp_(0, 1)
