"""Judging a run for machines that are not here.

program.py   the step lowered for the platform, and partitioned for the mesh on simulated devices
memory.py    bytes a device needs, by an analytic model
roofline.py  seconds a step takes, by an analytic model
verdict.py   all of it about one run, and the batch and remat policy that would fit
cli.py       the `lower` command
"""
