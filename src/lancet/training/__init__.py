"""Training of sparse autoencoders: each architecture's step, and how its sparsity is brought to the one asked for."""
