"""The functions that users call, one form of the algorithm each.

Read in this order: ``optimizer`` (the optax transformation), ``gradient`` (gradients in
factor coordinates), ``apply`` (their way to the weights); ``adapter``, ``link_end`` and
``unmerged`` (frozen base, trained factors); ``fused`` (the update inside the backward
pass) and ``trainer`` (one object for a run). ``pure``, ``summary``, ``trace`` and
``shardings`` are functions of a model and a spec alone.
"""
