"""Predicts memory, traffic and time of a run on machines that are not here.

program.py   the step, lowered for the platform and partitioned for the mesh on simulated devices
compiled.py  the step, compiled by the target's own compiler
memory.py    bytes that a device needs, from a model
roofline.py  seconds that a step takes, from a model
verdict.py   the verdict on a run, and the batch and remat policy that would fit
serving.py   memory of a model that is served, and seconds of a token
cli.py       the `lower` command
"""
