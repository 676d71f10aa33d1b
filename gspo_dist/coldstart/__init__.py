"""Models to start from: small ones made on the spot, and mixtures of experts made of dense ones."""
