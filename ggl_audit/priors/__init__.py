"""Priors: generators whose latent space is searched, bundled, trained here, or the user's own."""
