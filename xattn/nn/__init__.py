"""Modules: a spec with weights."""
