"""The chain log rebuilds weights bit by bit and refuses what is not its own."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import raclora_jax as rl
from raclora_jax.checkpoint import ChainLog

LINKS = 4
SPECS = {
    "float32": ("float32", rl.Spec(2)),
    "bfloat16": ("bfloat16", rl.Spec(2, alpha="dim")),
    "drawn side": ("float32", rl.Spec(2, side=0.5)),
    "no cache": ("bfloat16", rl.Spec(2, cache=False)),
    "frozen rest": ("bfloat16", rl.Spec(2, rest="frozen", sketch="block")),
}


def base_of(dtype="float32", seed=0):
    kernel = jax.random.normal(jax.random.key(seed), (9, 7))
    leaves = {"kernel": kernel, "bias": jnp.arange(7.0), "scale": jnp.asarray(0.3)}
    return {path: leaf.astype(dtype) for path, leaf in leaves.items()}


def trained(factors, link):
    """Stands for a link of training: numbers that round."""
    return jax.tree.map(
        lambda f: f + jnp.sin(link + jnp.arange(f.size) + 0.1).reshape(f.shape), factors
    )


def logged_chain(folder, spec, base, key=3, links=LINKS):
    log, (factors, chain) = ChainLog(folder), rl.init_adapter(base, spec, key=key)
    all_weights = [base]
    for link in range(links):
        factors = trained(factors, link)
        base, factors, chain = log.next_link(base, factors, chain, spec)
        all_weights.append(base)
    return log, all_weights


@pytest.mark.parametrize("name", SPECS)
def test_rebuilds_bit_by_bit(name, tmp_path):
    dtype, spec = SPECS[name]
    _, weights = logged_chain(tmp_path, spec, base_of(dtype))
    assert not np.array_equal(weights[0]["kernel"], weights[-1]["kernel"])
    log = ChainLog(tmp_path)
    assert log.links() == list(range(LINKS))
    assert_same_bits(log.rebuild(base_of(dtype)), weights[-1])
    assert_same_bits(log.rebuild(base_of(dtype), links=2), weights[2])


def test_a_log_that_begins_later(tmp_path):
    """Records of the first links are not needed where the weights after them are."""
    log, weights = logged_chain(tmp_path, rl.Spec(2), base_of())
    for link in (0, 1):
        (tmp_path / f"link-{link:08d}").unlink()
    assert_same_bits(log.rebuild(weights[2]), weights[-1])


def test_sharded_weights(tmp_path):
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((7,), ("d",), auto, devices=jax.devices()[:7])
    home = NamedSharding(mesh, PartitionSpec(None, "d"))
    base = base_of()
    spread = base | {"kernel": jax.device_put(base["kernel"], home)}
    log, weights = logged_chain(tmp_path, rl.Spec(2), spread)
    assert_same_bits(log.rebuild(spread), weights[-1])


def test_a_run_set_back_writes_the_same_again(tmp_path):
    _, weights = logged_chain(tmp_path, rl.Spec(2), base_of())
    log, again = logged_chain(tmp_path, rl.Spec(2), base_of(), links=2)
    assert_same_bits(again[2], weights[2])
    assert_same_bits(log.rebuild(base_of()), weights[-1])
    with pytest.raises(
        ValueError, match=r"link-00000000 is there already and holds other"
    ):
        logged_chain(tmp_path, rl.Spec(2), base_of(), key=4)
    assert_same_bits(log.rebuild(base_of()), weights[-1])


def harmed(folder, link, change):
    path = folder / f"link-{link:08d}"
    path.write_bytes(change(path.read_bytes()))


def test_a_cut_record_is_refused_by_name(tmp_path):
    log, weights = logged_chain(tmp_path, rl.Spec(2), base_of())
    for change in (
        lambda raw: raw[:-3],
        lambda raw: raw[:20],
        lambda raw: b"",
        lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:],
    ):
        whole = (tmp_path / "link-00000002").read_bytes()
        harmed(tmp_path, 2, change)
        with pytest.raises(
            ValueError, match=r"link-00000002 is no whole record.*cut short"
        ):
            log.rebuild(base_of())
        assert_same_bits(log.rebuild(base_of(), links=2), weights[2])
        (tmp_path / "link-00000002").write_bytes(whole)
    (tmp_path / "link-00000001").unlink()
    with pytest.raises(FileNotFoundError, match="link-00000001 is missing"):
        log.rebuild(base_of())
    with pytest.raises(FileNotFoundError, match="no record in"):
        ChainLog(tmp_path / "new").rebuild(base_of())


def test_a_foreign_record_is_refused_by_name(tmp_path):
    mine, _ = logged_chain(tmp_path / "mine", rl.Spec(2), base_of())
    logged_chain(tmp_path / "yours", rl.Spec(2), base_of(seed=1))
    foreign = (tmp_path / "yours" / "link-00000001").read_bytes()
    harmed(tmp_path / "mine", 1, lambda raw: foreign)
    with pytest.raises(
        ValueError, match=r"link-00000001, leaf 'kernel': .*other weights"
    ):
        mine.rebuild(base_of())
    with pytest.raises(
        ValueError, match=r"link-00000000, leaf 'kernel': .*other weights"
    ):
        mine.rebuild(base_of(seed=2))


def test_a_record_under_another_name_is_refused(tmp_path):
    """In a chain whose weights rest, nothing but its own number tells a record's link."""
    log, (factors, chain) = ChainLog(tmp_path), rl.init_adapter(base_of(), 2, key=0)
    base = base_of()
    for _ in range(2):
        base, factors, chain = log.next_link(base, factors, chain, 2)
    (tmp_path / "link-00000001").write_bytes((tmp_path / "link-00000000").read_bytes())
    with pytest.raises(
        ValueError, match="link-00000001 is the record of link 0, not of 1"
    ):
        log.rebuild(base_of())


def test_a_killed_write_leaves_nothing_that_counts(tmp_path):
    log, weights = logged_chain(tmp_path, rl.Spec(2), base_of(), links=2)
    (tmp_path / ".link-00000002.partial").write_bytes(b"half")
    assert log.links() == [0, 1]
    assert_same_bits(log.rebuild(base_of()), weights[2])


def test_links_that_are_not_there_are_asked_for(tmp_path):
    """A log that lost its newest records says so to whoever knows how many there were."""
    log, weights = logged_chain(tmp_path, rl.Spec(2), base_of(), links=3)
    with pytest.raises(
        FileNotFoundError, match=r"3 records, links 0 to 2, and 5 were asked for"
    ):
        log.rebuild(base_of(), links=5)
    for links in (0, -1):
        with pytest.raises(ValueError, match=f"links must be at least 1, got {links}"):
            log.rebuild(base_of(), links=links)
    with pytest.raises(TypeError, match="links must be an int, got '2'"):
        log.rebuild(base_of(), links="2")
    (tmp_path / "link-00000002").unlink()
    with pytest.raises(FileNotFoundError, match="2 records"):
        log.rebuild(base_of(), links=3)
    assert_same_bits(log.rebuild(base_of(), links=2), weights[2])


def advanced(log, base, key):
    factors, chain = rl.init_adapter(base, 2, key=key)
    return log.next_link(base, trained(factors, 0), chain, 2)


def test_two_writers_of_one_link(tmp_path, monkeypatch):
    """One that writes while another does: neither's file is the other's, or half of it.

    Whoever lost hears of it at its next link.
    """
    base, logs = base_of(), [ChainLog(tmp_path), ChainLog(tmp_path)]
    real, done = os.fsync, []

    def fsync(descriptor):
        monkeypatch.setattr(os, "fsync", real)
        done.append(advanced(logs[1], base, key=4))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    mine = advanced(logs[0], base, key=3)
    assert_same_bits(logs[0].rebuild(base), mine[0])
    with pytest.raises(ValueError, match=r"link-00000000, leaf.*another run writes here"):
        logs[1].next_link(*done[0], 2)
    assert logs[0].links() == [0]
    logs[0].next_link(*mine, 2)
    assert logs[0].links() == [0, 1]


def test_partial_files_are_of_one_writer_and_do_not_stay(tmp_path, monkeypatch):
    """Those of the last hour may be somebody's; a write that fails takes its own away."""
    old, new = tmp_path / ".link-00000007.partial", tmp_path / ".link-00000008.a.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    names, real = [], os.fsync

    def fsync(descriptor):
        names.append(sorted(path.name for path in tmp_path.glob(".link-00000000.*")))
        real(descriptor)

    with monkeypatch.context() as watched:
        watched.setattr(os, "fsync", fsync)
        advanced(ChainLog(tmp_path), base_of(), key=3)
    first, after = names
    assert len(first) == 1  # of the file
    assert not after  # of the folder, when it is there under its name
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "link-00000000"]

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"link 0 was not written.*No space left"):
            advanced(ChainLog(tmp_path / "full"), base_of(), key=3)
    assert not list((tmp_path / "full").iterdir())


def test_the_umask_is_kept(tmp_path):
    before = os.umask(0o077)
    try:
        logged_chain(tmp_path / "log", rl.Spec(2), base_of(), links=1)
    finally:
        os.umask(before)
    file = tmp_path / "log" / "link-00000000"
    assert [path.stat().st_mode & 0o777 for path in (file.parent, file)] == [0o700, 0o600]


def test_a_folder_in_place_of_a_record(tmp_path):
    log, _ = logged_chain(tmp_path, rl.Spec(2), base_of(), links=2)
    (tmp_path / "link-00000001").unlink()
    (tmp_path / "link-00000001").mkdir()
    with pytest.raises(ValueError, match=r"link-00000001 is no whole record.*directory"):
        log.rebuild(base_of())
