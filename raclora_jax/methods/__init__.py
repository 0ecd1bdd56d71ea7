"""The other methods of the field, for comparison, on the same pieces.

Each is a ``Method`` with the same three functions, so that one loop trains them all:
``full``, ``lora``, ``asymmetric``, ``cola``, ``published_raclora``, and the library's own
``raclora`` beside them.
"""

from raclora_jax.methods.asymmetric import asymmetric
from raclora_jax.methods.cola import cola
from raclora_jax.methods.full import full
from raclora_jax.methods.lora import lora
from raclora_jax.methods.method import Method
from raclora_jax.methods.published import published_raclora
from raclora_jax.methods.raclora import raclora

__all__ = [
    "Method",
    "asymmetric",
    "cola",
    "full",
    "lora",
    "published_raclora",
    "raclora",
]
