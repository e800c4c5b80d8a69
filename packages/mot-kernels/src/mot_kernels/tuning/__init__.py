"""Tile sizes: what a config is (`config`) and which one a problem gets (`lookup`)."""
