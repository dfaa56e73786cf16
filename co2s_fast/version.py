"""The version, written once; setup.py and CMake read this line."""

__version__ = "0.1.0"
