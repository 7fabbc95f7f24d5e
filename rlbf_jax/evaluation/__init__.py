"""How attempts become numbers: metrics of single rows, their intervals,
and the records of `results.json`."""
