"""`tiue serve`: a page and an HTTP API over one engine, whose requests share passes."""
