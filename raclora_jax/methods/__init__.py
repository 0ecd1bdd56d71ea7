"""The other methods of the field, for comparison, on the same pieces.

Each is a ``Method`` with the same three functions, so that one loop trains them all:
``full``, ``lora``, ``asymmetric``, ``cola``, ``published_raclora``, ``galore``,
``golore``, ``flora``, and the library's own ``raclora`` beside them.
"""

from raclora_jax.methods._asymmetric import asymmetric
from raclora_jax.methods._cola import cola
from raclora_jax.methods._flora import flora
from raclora_jax.methods._full import full
from raclora_jax.methods._galore import galore
from raclora_jax.methods._golore import golore
from raclora_jax.methods._lora import lora
from raclora_jax.methods._method import Method
from raclora_jax.methods._published import published_raclora
from raclora_jax.methods._raclora import raclora

__all__ = [
    "Method",
    "asymmetric",
    "cola",
    "flora",
    "full",
    "galore",
    "golore",
    "lora",
    "published_raclora",
    "raclora",
]
