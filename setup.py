"""Everything about the package stands in pyproject.toml; this file is where the CUDA extension below csrc/ is built
from once there is one.

The pure Python package installs everywhere, with or without a CUDA compiler.
"""

from setuptools import setup

setup(ext_modules=[])
