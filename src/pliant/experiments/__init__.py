"""The verbs of the program ``pliant``; users of the library may ignore this folder.

train, sweep, compress, export, compare, demo   the verbs, one file each
methods           the training methods, a row each
models, networks  the networks: by name; their modules
run_folder        the files of a training
workbench         one trained network under one compressor
training          settings, and the loop over them
comparison        suites and their runs
baselines         the methods compared with
data              data sets and their readers
"""
