"""Benchmarks: networks, the operator and the band mix against the plain convolution."""
