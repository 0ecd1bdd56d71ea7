"""The log of a chain: what every link trained, from which the weights are rebuilt."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raclora_jax._core import checks, paths
from raclora_jax._core.digest import digests
from raclora_jax._core.disk import write
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._core.types import Leaves, PyTree
from raclora_jax._extras import extra
from raclora_jax._forms.adapter import AdapterChain, init_adapter
from raclora_jax._forms.link_end import link_end, on_host
from raclora_jax.checkpoint._everyone import one_line

with extra("checkpoint"):
    from raclora_jax._core import record as records

_FORMAT = "raclora_jax record 1"
_NAME = re.compile(r"link-(\d{8,})")


@dataclasses.dataclass(frozen=True)
class _Record:
    """One link: where it began, what it trained, where it ended.

    Attributes:
      link: Index of the link.
      key_data: The two words of the chain's key.
      spec: The spec of the run.
      before: Digests of the weights it began with.
      after: Digests of the merged weights.
      factors: ``{path: array}``.
    """

    link: int
    key_data: list[int]
    spec: Spec
    before: dict[str, int]
    after: dict[str, int]
    factors: Leaves

    def to_bytes(self) -> bytes:
        """The record, see ``_core.record``."""
        head = {
            "format": _FORMAT,
            **{field: getattr(self, field) for field in _FIELDS},
            "spec": self.spec.to_json(),
        }
        numbers = {f"numbers:{path}": leaf for path, leaf in self.factors.items()}
        return records.to_bytes(head, numbers)

    @classmethod
    def from_bytes(cls, raw: bytes) -> _Record:
        """Reads what ``to_bytes`` wrote; anything else is a ``ValueError``."""
        return records.from_bytes(raw, _FORMAT, cls._read)

    @classmethod
    def _read(cls, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> _Record:
        said = {field: head[field] for field in _FIELDS}
        spec = Spec.from_json(head["spec"])
        factors = {name.removeprefix("numbers:"): one for name, one in arrays.items()}
        return cls(**said, spec=spec, factors=factors)


_FIELDS = ("link", "key_data", "before", "after")


class ChainLog:
    """What every link of an adapter chain trained, a small file each.

    ``W_n = W_0 + sum_k lift(F_k)``, rounded once a link: the base, the key and the
    factors are all there is to a fine-tuned model, and ``rebuild`` gives its weights bit
    by bit, or says which bits differ. A record also holds digests of the weights before
    and after its link, so that one of another chain is refused.

    Only the adapter form has such a log. The optimizer and the gradient form add to the
    weights in every step and round there, so that no product of a link gives their bits;
    keep checkpoints of those.

    Args:
      directory: Where the records are; made if it is not there.

    Example:
      >>> import tempfile, raclora_jax as rl
      >>> base, log = {"kernel": jnp.ones((6, 4))}, ChainLog(tempfile.mkdtemp())
      >>> factors, chain = rl.init_adapter(base, 2, key=0)
      >>> factors = jax.tree.map(jnp.ones_like, factors)  # stands for training
      >>> merged, factors, chain = log.next_link(base, factors, chain, 2)
      >>> bool((log.rebuild(base)["kernel"] == merged["kernel"]).all())
      True
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = pathlib.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)

    def next_link(
        self,
        base_params: PyTree,
        factors: PyTree,
        chain: AdapterChain,
        spec: Spec | int,
        *,
        error: PyTree = None,
    ) -> tuple[Any, ...]:
        """``raclora_jax.next_link``, leaf by leaf on one device, with a record of it.

        A run that was set back to an earlier checkpoint writes the same records again,
        which changes nothing; other ones are refused.

        Args:
          base_params: The weights of the link that ends.
          factors: The trained tree.
          chain: Where the chain stands.
          spec: The spec of the run.
          error: The carried errors of a quantised base.

        Returns:
          ``(base_params, factors, chain)`` of the next link, or
          ``(base_params, error, factors, chain)`` as of ``quantized.next_link``.

        Raises:
          ValueError: If factors, chain and base do not belong together, another run has
            written this link's record, or the record before it ends at other weights or
            is damaged.
          OSError: If the record cannot be written.
        """
        spec = as_spec(spec)
        after = _ended(base_params, error, factors, chain, spec)
        trained, _ = paths.flatten(factors)
        record = _Record(
            link=int(chain.link),
            key_data=np.asarray(chain.key_data).tolist(),
            spec=spec,
            before=_digests_of(base_params, error),
            after=_digests_of(*after[:2]),
            factors={path: on_host(leaf) for path, leaf in trained.items()},
        )
        if jax.process_index() == 0:
            self._write(record)
        return after if error is not None else (after[0], *after[2:])

    def links(self) -> list[int]:
        """The links that there are records of, in order."""
        found = map(_NAME.fullmatch, os.listdir(self._directory))
        return sorted(int(match[1]) for match in found if match)

    def rebuild(
        self, base_params: PyTree, *, error: PyTree = None, links: int | None = None
    ) -> Any:
        """The weights after the log's links, bit by bit.

        Args:
          base_params: The weights that the first of them began with.
          error: The errors beside them, of a quantised base.
          links: How many of them; all that are there if left out, so give it where it is
            known.

        Returns:
          The weights, with the dtypes and shardings of ``base_params``, or
          ``(base_params, error)`` if there is one.

        Raises:
          FileNotFoundError: If there is no record, or one of those asked for is missing.
          ValueError: If a record is cut short or of another chain, the base is another
            one, or the bits come out otherwise on this device or version.
        """
        found = self.links()
        if not found:
            raise FileNotFoundError(f"no record in {self._directory}")
        if links is not None and checks.count("links", links) > len(found):
            raise FileNotFoundError(
                f"{self._directory} holds {len(found)} records, links {found[0]} to "
                f"{found[-1]}, and {links} were asked for; bring the others back, or ask "
                "for fewer"
            )
        base = base_params
        for index in range(found[0], found[0] + (links or len(found))):
            record = self._read(index)
            spec = record.spec
            _same(record.before, _digests_of(base, error), self._path(index), _OTHER_BASE)
            template, chain = init_adapter(base, spec, key=_key(record))
            chain = chain._replace(link=jnp.full((), index, jnp.int32))
            trained = _filled(template, record, self._path(index))
            base, error, *_ = _ended(base, error, trained, chain, spec)
            _same(record.after, _digests_of(base, error), self._path(index), _OTHER_BITS)
        return base if error is None else (base, error)

    def _path(self, link: int) -> pathlib.Path:
        return self._directory / f"link-{link:08d}"

    def _read(self, link: int) -> _Record:
        path = self._path(link)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing, and later links are there; bring it back, or "
                "rebuild the links before it with links="
            )
        try:
            record = _Record.from_bytes(path.read_bytes())
        except Exception as error:  # a damaged file shows as anything
            raise ValueError(
                f"{path} is no whole record ({one_line(error)}); bring it back, or "
                "rebuild the links before it with links="
            ) from error
        if record.link != link:
            raise ValueError(f"{path} is the record of link {record.link}, not of {link}")
        return record

    def _write(self, record: _Record) -> None:
        """Adds a record to those there; a chain that two runs write to is refused."""
        path, raw = self._path(record.link), record.to_bytes()
        if path.exists():
            # A run set back to a checkpoint comes to links that it has written before.
            if path.read_bytes() == raw:
                return
            self._read(record.link)
            raise ValueError(
                f"{path} is there already and holds other numbers: another run, or "
                "another base, key or spec; give each chain a directory of its own"
            )
        before = self._path(record.link - 1)
        if before.exists():
            _same(self._read(record.link - 1).after, record.before, before, _OTHER_RUN)
        try:
            write(path, raw)
        except OSError as error:
            raise OSError(
                f"the record of link {record.link} was not written to "
                f"{self._directory}: {one_line(error)}; the log cannot go on without it"
            ) from error


_OTHER_RUN = (
    "ends at other weights than this link began with: another run writes here too, or a "
    "link was merged without the log; give each chain a directory of its own"
)
_OTHER_BASE = "was written for other weights: hand over those that the log began with"
_OTHER_BITS = (
    "gives other bits here than where it was written: rebuild on the same kind of device "
    "with the same versions of jax and raclora_jax"
)


def _ended(
    base: PyTree, error: PyTree, factors: PyTree, chain: AdapterChain, spec: Spec
) -> tuple[Any, ...]:
    """``(base_params, error, factors, chain)`` of the next link."""
    if error is None:
        base, *rest = link_end([base], factors, chain, spec)
        return base, None, *rest
    from raclora_jax.quantized._merge import compiled_merge

    return link_end([base, error], factors, chain, spec, compiled_merge)


def _digests_of(base: PyTree, error: PyTree) -> dict[str, int]:
    held = base if error is None else {"base_params": base, "error": error}
    return digests(paths.flatten(held)[0])


def _same(there: dict[str, int], here: dict[str, int], file: Any, why: str) -> None:
    for path in [*there, *here]:
        if there.get(path) != here.get(path):
            raise ValueError(f"{file}, leaf {paths.show(path)}: the record {why}")


def _key(record: _Record) -> jax.Array:
    return jnp.asarray(record.key_data, jnp.uint32)


def _filled(template: PyTree, record: _Record, file: pathlib.Path) -> PyTree:
    leaves, treedef = paths.flatten(template)
    if leaves.keys() != record.factors.keys():
        path = sorted(leaves.keys() ^ record.factors.keys())[0]
        raise ValueError(f"{file}, leaf {paths.show(path)}: {_OTHER_BASE}")
    return paths.unflatten(treedef, {path: record.factors[path] for path in leaves})
