"""What the program ``pliant`` does; a library user may ignore all of it.

train, sweep, compress, export, compare, demo   the verbs, one file each
methods           the training methods, a row each
models, networks  the networks: by name, and what they are made of
run_folder        what a training leaves behind
workbench         one trained network under one compressor
training          settings, and the loop over them
comparison        suites and what they ask for
baselines         the methods compared with
data              images: data sets and their readers
"""
