"""Instruments that show and measure what backpropagation through time does.

`worked_example` works one word through, every number shown; `throughtime explain` prints it.
"""
