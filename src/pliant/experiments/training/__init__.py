"""Training one network: the parts of :func:`pliant.train`.

settings       every setting: its kind, its range and its description
method         a training method: its optimizer, its own settings
flags          the flags of ``pliant train``
session        a training in progress: the network, its optimizer, the loop over epochs and steps
optimizers     the optimizers of the methods
schedules      learning rates: a warm-up, then a schedule; the learning rate that gives a turnover
checkpoint     the state from which a training continues as if it had never stopped
log, trackers  a line per epoch: in train.jsonl, in TensorBoard and others
display        the progress that a person sees
determinism    bitwise equal results from run to run
onednn         a workaround for a fault of oneDNN
"""
