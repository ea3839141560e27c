"""Images as a bundle's vision graph takes them: checked, brought to its size, and laid together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsedge.errors import BundleError, OptionError
from rsedge.pixels import ReflectanceRule, resize

if TYPE_CHECKING:
    from rsedge.bundle import Bundle

UInt8 = NDArray[np.uint8]


def fitting_images(images: NDArray[Any], size: int, resample: str) -> UInt8:
    """``images`` [B, H, W, 3] as uint8 [B, size, size, 3].

    Raises:
        OptionError: Images of another shape or type.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise OptionError(
            f"images are {images.dtype} {list(images.shape)}, expected uint8 [B, H, W, 3]; "
            "for one image pass image[None]"
        )
    if 0 in images.shape[1:3]:
        raise OptionError(f"images are {images.shape[1]} x {images.shape[2]} pixels: there is nothing to see")
    if images.shape[1:3] == (size, size):
        return images
    resized = [resize(image, size, resample) for image in images]
    return np.array(resized, np.uint8).reshape(len(images), size, size, 3)


def stack_images(images: Sequence[UInt8]) -> UInt8:
    """Images, uint8 [H, W, 3] of one size, as a contiguous batch uint8 [B, H, W, 3].

    Tiles come plane after plane in memory; ``np.stack`` would keep them so.
    """
    batch = np.empty((len(images), *images[0].shape), np.uint8)
    for into, image in zip(batch, images, strict=True):
        for channel in range(3):  # several times as fast as all at once
            into[..., channel] = image[..., channel]
    return batch


def check_image_spec(bundle: Bundle) -> None:
    """Refuse a bundle made for pixels this runtime does not make.

    Raises:
        BundleError: Other bands, or another reflectance rule.
    """
    image = bundle.manifest.image
    rule, known = image.reflectance.get("full_scale"), ReflectanceRule().full_scale
    if image.bands != ("red", "green", "blue"):
        raise BundleError(f"{bundle.path} sees the bands {', '.join(image.bands)}; this rsedge reads red, green, blue")
    if rule not in (None, known):
        raise BundleError(f"{bundle.path} was made for reflectance with full scale {rule}; this rsedge uses {known}")
