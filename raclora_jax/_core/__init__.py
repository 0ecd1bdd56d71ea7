"""Arrays in, arrays out: no model, no optax rule.

Read in this order: ``spec`` (what a user asks for), ``plan`` (what a leaf's plan is) and
``planning`` (how plans are made), ``sketch`` (draws), ``lowrank`` (project and lift),
``merge`` and ``rounding`` (the way back to a weight). ``contraction`` is the product
by labels under all of it, ``select`` and ``picks`` are sketches that pick rows,
``sharding`` is where arrays live, ``sides`` what a drawn side holds, ``factor`` what a
gradient or an update carries.
"""
