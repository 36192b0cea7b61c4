"""The command line: parse, call, print. One file a noun, loaded when it is asked for."""

import gc

# A command is over before there is garbage worth looking for: looking after every 700 objects costs a tenth of it.
gc.set_threshold(100_000, 10, 10)
