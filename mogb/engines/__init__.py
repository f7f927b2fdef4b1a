"""Autograd: from K losses on a graph to one direction in ``param.grad``."""
