"""Reference models, one file per family, built from this package's modules.

A family is an `nn.Module` made from (image_shape, classes, **options). forward(x0, label) is its training objective
and sample(n, seed=…) draws images (n, C, H, W) in [-1, 1].
"""

from .diffusion import Diffusion

FAMILIES = {"diffusion": Diffusion}


def create(family, image_shape, classes, **options):
    """A new model of the family; options are those of its class.

    Raises: ValueError for a family that doesn't exist, TypeError for an option the family doesn't have.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    return FAMILIES[family](image_shape, classes, **options)


__all__ = ["FAMILIES", "Diffusion", "create"]
