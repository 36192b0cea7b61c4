"""The command line: parse, call, print. One file a noun, loaded when it is asked for."""
