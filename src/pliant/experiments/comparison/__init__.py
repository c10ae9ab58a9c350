"""The comparison of methods according to a suite: the parts of :func:`pliant.compare`.

suite       the description of a comparison, read from YAML; shipped suites are in suites/
joining     methods that the suite does not name
comparison  the jobs of a suite that are done, and those that are missing
job         a training and its measurements as plain data
performing  train, compress and measure one job
step_cost   the time and the memory of a step
retraining  the reference that may train again for every size
workers     perform jobs in this process or on a Ray cluster
rehearsal   a few steps of everything on noise, before the real comparison
"""
