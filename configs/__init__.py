"""Hydra's YAML files; the package exists so that they travel in the wheel."""
