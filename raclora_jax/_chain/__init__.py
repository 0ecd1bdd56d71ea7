"""What lives from step to step.

Read in this order: ``state`` (what it holds, and which link is now), ``start`` (how it is
made and checked), ``step`` (project, run the inner rule, count). ``inner`` is what the
library knows of optax rules, ``orthogonal`` a rule of its own, ``slices`` the same step
for one slice of a stack, as a fused step takes it.
"""
