"""Small models made on the spot: the quickstart's cold start, and a random one for speed comparisons."""
