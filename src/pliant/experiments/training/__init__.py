"""Training one network: what :func:`pliant.train` is made of.

settings       every setting: its kind, its range, what it is for
method         what a training method is: how it is built, its own settings
flags          the settings as flags of ``pliant train``, and its help
optimizers     what the methods train with
session        a training in progress: the network, what optimizes it, the loop over epochs and steps
schedules      learning rates: a warm-up, then a schedule; the one that a turnover asks for
checkpoint     what a training must keep to go on as if it had never stopped
log, trackers  a line per epoch: in train.jsonl, in TensorBoard and others
display        what a person sees meanwhile
determinism    the same result in every bit, from run to run
onednn         a fault of a library that is avoided
"""
