"""What a run will take, before it runs: its real programs, compiled from shapes for devices that
need not be there. Needs no parameters, data, checkpoint or accelerator.

`topology` (devices), `chips` (what one of them can do), `phases` (the programs of an experiment),
`forecast` (bytes, operations, exchanges and seconds of one), `table` (meshes and batches side by
side).
"""
