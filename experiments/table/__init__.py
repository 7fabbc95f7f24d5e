"""The pieces of docs/results.md: what is run, how it is run again where it stopped,
and what is written."""
