"""Maps the source layout onto the installed package; metadata is in pyproject.toml.

``kernels/`` sits at the top of the repository and installs as ``rsaft_fast.kernels``, never as a top-level package.
"""

from setuptools import find_packages, setup

packages = find_packages(include=["rsaft_fast", "rsaft_fast.*"])

setup(
    packages=packages + ["rsaft_fast.kernels"],
    package_dir={"rsaft_fast.kernels": "kernels"},
    package_data={"rsaft_fast": ["playground/assets/**/*", "py.typed"]},
)
