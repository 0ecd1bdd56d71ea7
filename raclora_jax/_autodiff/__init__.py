"""A model's program, run with stand-ins for its leaves.

Read in this order: ``weight`` (what stands for a leaf, and an example by hand),
``attach`` (a derivative by the factor, put on a value), ``consume`` (products,
convolutions, lookups: where a leaf is used up), ``interpret`` (the loop over a program's
equations). ``rearrange``, ``arithmetic`` and ``join`` are more rules; ``picked`` is
``consume`` for laws that pick rows; ``updating`` and ``rounds`` are the fused step, and
``watch`` reads a program for its views without running it.

Why an interpreter of its own. Quax dispatches primitives on array-like objects too, and
its first example is a LoRA array; but what it propagates is a value, and here the value
of a leaf is only its base: what is new is a *derivative*, of one factor, put on outputs
by ``attach``. And a leaf has to go through ``scan``, ``remat``, ``cond``, ``while`` and
``shard_map`` as base, sketch and factor with axes that have names, some of them carried
and some sliced. Qwix intercepts functions such as ``jax.lax.dot_general`` while a model
runs, which sees a call and not the leaf behind it: a transpose, a reshape or a cast
between the two hides which axes were sketched, and a loop's body is seen once for all its
layers.
"""
