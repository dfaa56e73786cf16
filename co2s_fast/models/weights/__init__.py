"""Weights by name or from files of known layouts: registry, conversion, fetching, verification."""
