"""The other methods of the field, for comparison, on the same pieces.

Each is a ``Method`` with the same five functions, so that one loop trains them all.
``full``, ``muon`` and ``adalomo`` train every number in every step, ``badam`` and
``lisa`` some layers at a time. A pair of factors beside frozen weights is trained by
``lora``, ``lora_plus``, ``rslora``, ``pissa``, ``lora_fa``, ``asymmetric``, ``dora``,
``sora``, ``lora_pro``, ``lora_rite``, ``allora`` and ``heterolora``, and in a chain by
``cola``, ``xgblora``, ``rso``, ``fed_krso`` and ``published_raclora``. ``galore``,
``golore``, ``fira``, ``apollo``, ``apollo_mini`` and ``flora`` form the gradient and keep
their state in a low-rank basis. The library's own ``raclora`` stands beside them, and
``layered``, an experiment with it.

A method of your own is ``pair_method`` of ``Pieces``, or ``from_transform`` of an optax
transformation.

Read in this order: ``_method`` (the five functions), ``_pieces`` and ``_pair`` (how a
method of pairs is put together; ``_pair_state`` is its state), ``_plain`` (the shortest
methods), ``_projected`` (those that form the gradient), ``_layers`` (those that train
some layers). Every other file is one method; ``_algebra`` is what several share.
"""

from raclora_jax.methods._adalomo import adalomo
from raclora_jax.methods._allora import allora
from raclora_jax.methods._apollo import apollo, apollo_mini
from raclora_jax.methods._badam import badam
from raclora_jax.methods._dora import dora
from raclora_jax.methods._fed_krso import fed_krso
from raclora_jax.methods._fira import fira
from raclora_jax.methods._flora import flora
from raclora_jax.methods._full import full
from raclora_jax.methods._galore import galore
from raclora_jax.methods._golore import golore
from raclora_jax.methods._heterolora import heterolora
from raclora_jax.methods._layered import layered
from raclora_jax.methods._lisa import lisa
from raclora_jax.methods._lora_fa import lora_fa
from raclora_jax.methods._lora_plus import lora_plus
from raclora_jax.methods._lora_pro import lora_pro
from raclora_jax.methods._lora_rite import lora_rite
from raclora_jax.methods._method import Method, from_transform
from raclora_jax.methods._muon import muon
from raclora_jax.methods._pair import pair_method
from raclora_jax.methods._pieces import Cases, Joint, Pieces, Subset
from raclora_jax.methods._pissa import pissa
from raclora_jax.methods._plain import asymmetric, cola, lora
from raclora_jax.methods._published import published_raclora
from raclora_jax.methods._raclora import raclora
from raclora_jax.methods._rslora import rslora
from raclora_jax.methods._rso import rso
from raclora_jax.methods._sora import sora
from raclora_jax.methods._xgblora import xgblora

__all__ = [
    "Cases",
    "Joint",
    "Method",
    "Pieces",
    "Subset",
    "adalomo",
    "allora",
    "apollo",
    "apollo_mini",
    "asymmetric",
    "badam",
    "cola",
    "dora",
    "fed_krso",
    "fira",
    "flora",
    "from_transform",
    "full",
    "galore",
    "golore",
    "heterolora",
    "layered",
    "lisa",
    "lora",
    "lora_fa",
    "lora_plus",
    "lora_pro",
    "lora_rite",
    "muon",
    "pair_method",
    "pissa",
    "published_raclora",
    "raclora",
    "rslora",
    "rso",
    "sora",
    "xgblora",
]
