"""Weights of published checkpoints: names and shapes, the file format, reading, writing."""
