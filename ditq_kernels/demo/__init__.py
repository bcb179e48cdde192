"""The embedded model, and the main job carried out on it."""

from pathlib import Path

MODEL_DIRECTORY = Path(__file__).parent / "fashion_dit"
