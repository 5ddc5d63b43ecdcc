"""Kernels in C for the small operations between a CPU's matrix products, where the machine has a compiler."""
