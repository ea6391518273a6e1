"""Checks: timm's suite, consumers of timm backbones, compiled kernels, and the tables of the documentation."""
