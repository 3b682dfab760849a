"""Triton kernels: the five stages fused, forward and backward. The only package that imports triton.

It sees tensors, numbers and constexprs, never a spec; `xattn.ops.triton` translates. How the pieces fit: docs/kernels.md.
"""
