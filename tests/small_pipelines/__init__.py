"""Whole pipelines of diffusers, small enough to draw within a second on one core, with random weights.

An architecture is a function that builds its pipeline and an entry in ``IMAGES`` or ``VIDEOS``.
"""

from small_pipelines.entry import SmallPipeline, in_own_memory, randomised
from small_pipelines.images import IMAGES
from small_pipelines.videos import VIDEOS

PIPELINES: tuple[SmallPipeline, ...] = (*IMAGES, *VIDEOS)

__all__ = ["PIPELINES", "SmallPipeline", "in_own_memory", "randomised"]
