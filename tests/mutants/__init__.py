"""How many faults the tests let through: single changes to the source, drawn with a seed or planted by hand, each of
which the tests of its part are run against. ``make mutants``.
"""
