"""Weights of published checkpoints in and out: names and shapes, the file format, reading, writing."""
