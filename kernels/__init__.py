"""Triton kernels, installed as ``zfcore.kernels``. They import torch and triton, never zfcore."""
