"""Commands of `python -m tnt_kernels`."""
