"""The modules of BAGEL: VAE, vision transformer, embeddings, and the two-expert transformer."""
