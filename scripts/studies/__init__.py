"""Studies: the default weights, learning rates, and dilation against frequency."""
