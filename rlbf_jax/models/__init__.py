"""One decoder, its cache, and the heads on top of it."""
