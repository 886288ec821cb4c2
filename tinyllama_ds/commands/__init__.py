"""The commands of `tinyllama-ds`, by what they work on: arguments and calls, no logic."""
