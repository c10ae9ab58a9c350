"""Methods compared as a suite says: what :func:`pliant.compare` is made of.

suite       what to compare, read from YAML; those shipped are in suites/
joining     methods that the suite does not name
comparison  what is to be done of a suite, and what is there already
job         a training and its measurements as plain data
performing  a job done: trained, cut, measured
step_cost   the time and the memory of a step
retraining  the reference that may train again for every size
workers     here, or on a Ray cluster
rehearsal   a few steps of everything on noise, before the long way
"""
