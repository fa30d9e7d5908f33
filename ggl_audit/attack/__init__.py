"""The attack: labels, the batched objective, the latent search."""
